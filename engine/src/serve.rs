//! `engine serve`: bind first, then load, then serve until a signal comes.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use engine_cuda::Opened;
use engine_group::{Command, TcpGroup};
use engine_server::{
    ApiKeys, LoadFailure, Loader, OnFailure, RankLoader, ServerOptions, StartupHandle, Tls,
    TlsFiles, serve, serve_rank,
};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{LoadFormat, ServeArguments};
use crate::last_words::LastWords;
use crate::load::Weights;
use crate::ranks::World;
use crate::{configure, load, telemetry};

/// Threads for HTTP; the backend has its own.
const HTTP_THREADS: usize = 2;
/// Time to tell the other ranks that this one ends.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Serves until SIGTERM or SIGINT; a second signal ends the process at once.
pub fn run(arguments: ServeArguments) -> anyhow::Result<()> {
    let config = configure::for_serve(&arguments)?;
    let world = World::new(&arguments.group)?;
    let api_keys = keys("--api-key-file", arguments.api_key_file.as_deref())?;
    let admin_keys = keys("--admin-key-file", arguments.admin_key_file.as_deref())?;
    let tls = tls(&arguments).context("--tls-cert-file")?;
    telemetry::start(arguments.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .enable_all()
        .build()
        .context("the HTTP threads could not be started")?;
    let result = runtime.block_on(async move {
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be handled")?;
        let place = (config.host.as_str(), config.port);
        let listener = TcpListener::bind(place).await.with_context(|| {
            format!(
                "{}:{} cannot be listened on; choose another --host or --port",
                config.host, config.port
            )
        })?;
        let address = listener.local_addr().context("the address is unknown")?;
        tracing::info!(%address, model = config.served_name(), version = env!("CARGO_PKG_VERSION"), "listening");
        let mut options = ServerOptions::new(config.served_name());
        options.version = env!("CARGO_PKG_VERSION").to_owned();
        options.drain_timeout = Duration::from_secs(config.drain_timeout_seconds.into());
        options.max_queued_tokens = arguments.max_queued_tokens.map(|tokens| tokens as usize);
        options.request_timeout = arguments
            .request_timeout_seconds
            .map(|seconds| Duration::from_secs(seconds.into()));
        options.api_keys = api_keys;
        options.admin_keys = admin_keys;
        options.tls = tls;
        options.failure_linger = Duration::from_secs(arguments.failure_linger_seconds.into());
        let tool_call_parser = arguments.tool_call_parser;
        let opened = Opened::default();
        let last_words = LastWords::new(opened.clone(), arguments.termination_log);
        options.on_failure = Some(OnFailure(Arc::new(move |failure| last_words.say(failure))));
        let machine = load::Machine {
            choice: configure::device(&arguments.engine, &config),
            cuda_driver: arguments.engine.cuda_driver.clone(),
            opened,
            fetch: arguments.engine.cache.settings(),
            verify_weights: arguments.verify_weights,
            world: world.clone(),
        };
        let weights = match arguments.load_format {
            LoadFormat::Auto => Weights::Files,
            LoadFormat::Dummy => Weights::Random(arguments.seed),
        };
        let shutdown = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tokio::spawn(async move {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                tracing::warn!("a second signal ends the engine at once");
                std::process::exit(1);
            });
        };
        if !world.process.is_leader() {
            let loader: RankLoader = Box::new(move |startup: &StartupHandle| {
                load::load_rank(config, &machine, weights, startup)
            });
            return Ok(serve_rank(listener, options, loader, shutdown).await?);
        }
        let group: Arc<OnceLock<Arc<TcpGroup>>> = Arc::default();
        let found_group = group.clone();
        let loader: Loader = Box::new(move |startup: &StartupHandle| -> Result<_, LoadFailure> {
            let mut loaded = load::load(config, &machine, weights, startup, |group| {
                // Called once.
                let _ = found_group.set(group);
            })?;
            loaded.text.set_tool_call_parser(tool_call_parser);
            Ok(loaded)
        });
        serve(listener, options, loader, shutdown).await?;
        if let Some(group) = group.get() {
            // Ranks that do not hear it notice that this one is gone.
            let _ = group.try_broadcast(&Command::End.encode(), LAST_WORD);
        }
        Ok(())
    });
    // A load that is still going on must not keep the process alive.
    runtime.shutdown_timeout(Duration::from_millis(100));
    result
}

/// The keys in a file; none without one.
fn keys(flag: &str, file: Option<&Path>) -> anyhow::Result<ApiKeys> {
    let Some(file) = file else {
        return Ok(ApiKeys::default());
    };
    std::fs::read_to_string(file)
        .map_err(anyhow::Error::from)
        .and_then(|text| ApiKeys::parse(&text).map_err(anyhow::Error::msg))
        .with_context(|| format!("{flag} {}", file.display()))
}

/// The server's certificate, where one was given.
fn tls(arguments: &ServeArguments) -> anyhow::Result<Option<Arc<Tls>>> {
    let (Some(certificate), Some(key)) = (&arguments.tls_cert_file, &arguments.tls_key_file) else {
        return Ok(None);
    };
    let files = TlsFiles {
        certificate: certificate.clone(),
        key: key.clone(),
        client_ca: arguments.tls_client_ca_file.clone(),
    };
    Ok(Some(Arc::new(Tls::open(files)?)))
}
