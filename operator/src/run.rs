//! Wiring: connects, starts every task, and stops them in order.
//!
//! Order of stopping: the controller takes no new pass and ends those under way, events are written, then the lease is
//! given back. Giving it back earlier would let two operators write.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use operator_core::Settings;
use operator_k8s::apply::Applier;
use operator_k8s::lease::{Election, Leadership};
use operator_k8s::prometheus::Prometheus;
use operator_k8s::sampling::{Asked, Periods, Sampler};
use operator_k8s::scrape::Scraper;
use operator_k8s::world::World;
use operator_k8s::write::Writer;
use operator_k8s::{client, events};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::admin::{self, Health};
use crate::config::Config;
use crate::controller::Controller;
use crate::memory::Memory;
use crate::metrics::Metrics;

/// How long passes under way may take when stopping.
const STOP_TIMEOUT: Duration = Duration::from_secs(12);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// When the cluster's configuration, the address to listen on or the Prometheus URL cannot be used.
pub async fn run(config: Config) -> Result<()> {
    let mut stop = signals()?;
    let (client, default_namespace) = client::connect().await.context("cannot find the cluster")?;
    let prometheus = config
        .prometheus_url
        .as_deref()
        .map(Prometheus::new)
        .transpose()?;
    let metrics = Metrics::new();
    let world = World::new();
    let mut tasks = JoinSet::new();

    let (lease_stop, mut lease_stopped) = watch::channel(false);
    let (leadership, election) = match &config.lease {
        None => (Leadership::alone(), None),
        Some(lease) => {
            let namespace = if lease.namespace.is_empty() {
                &default_namespace
            } else {
                &lease.namespace
            };
            let (election, leadership) =
                Election::new(client.clone(), namespace, &lease.name, &config.identity);
            let ended = async move {
                let _ = lease_stopped.wait_for(|stopped| *stopped).await;
            };
            (leadership, Some(tokio::spawn(election.run(ended))))
        }
    };

    let (recorder, event_writer) = events::recorder(client.clone(), &config.identity);
    let event_writer = tokio::spawn(event_writer.run());
    let counted = metrics.clone();
    let sampler = Sampler::new(
        Arc::clone(&world),
        Scraper::new(config.scrape_timeout),
        prometheus,
        Periods {
            serving: config.scrape_period,
            draining: config.drain_poll,
        },
        Box::new(move |asked| match asked {
            Asked::Pod(answered) => counted.scrape(answered),
            Asked::PrometheusAnswered => counted.prometheus_query("ok"),
            Asked::PrometheusEmpty => counted.prometheus_query("empty"),
            Asked::PrometheusFailed => counted.prometheus_query("failed"),
        }),
    );

    let seen = Arc::clone(&world);
    let health = Health::new(move || seen.waiting_for());
    let refresh = {
        let (world, metrics, leadership, recorder) = (
            Arc::clone(&world),
            metrics.clone(),
            leadership.clone(),
            recorder.clone(),
        );
        move || {
            for (kind, _, errors, objects) in world.each() {
                metrics.watch(kind, errors, objects);
            }
            metrics.leader(leadership.is_held());
            metrics.events_dropped(recorder.dropped());
        }
    };
    let (bound, admin) = admin::bind(config.bind, health.clone(), metrics.clone(), refresh).await?;
    tasks.spawn(admin);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        admin = %bound,
        engine_image = %config.engine_image,
        namespace = config.namespace.as_deref().unwrap_or("(all)"),
        identity = %config.identity,
        lease = config.lease.is_some(),
        "operator started"
    );

    world.follow(&mut tasks, &client, config.namespace.as_deref());
    if config.resource_claims {
        world.follow_claims(&mut tasks, &client, config.namespace.as_deref());
    }
    if config.group_network_policies {
        world.follow_policies(&mut tasks, &client, config.namespace.as_deref());
    }
    tasks.spawn(Arc::clone(&sampler).run(leadership.clone()));
    let controller = Controller {
        world: Arc::clone(&world),
        applier: Applier::new(
            Writer::new(client.clone(), leadership.clone()),
            Arc::clone(&world),
        ),
        reader: operator_k8s::read::Reader::new(client),
        sampler,
        recorder,
        leadership,
        metrics,
        health,
        memory: Memory::default(),
        workers: config.workers,
        settings: Settings {
            engine_image: config.engine_image,
            image_pull_policy: config.engine_image_pull_policy.as_str().to_string(),
            network_policies: config.group_network_policies,
            node_cache: config.node_cache,
        },
    };
    controller
        .run(async { stop.recv().await }, STOP_TIMEOUT)
        .await;

    // The recorders are gone with the controller and the sampler; what is queued is written.
    tasks.shutdown().await;
    let _ = tokio::time::timeout(Duration::from_secs(2), event_writer).await;
    lease_stop.send_replace(true);
    if let Some(election) = election {
        let _ = tokio::time::timeout(Duration::from_secs(5), election).await;
    }
    tracing::info!("operator stopped");
    Ok(())
}

/// SIGTERM and SIGINT, whichever comes first.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

fn signals() -> Result<Signals> {
    Ok(Signals {
        terminate: signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?,
        interrupt: signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?,
    })
}

impl Signals {
    async fn recv(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => tracing::info!(signal = "SIGTERM", "stopping"),
            _ = self.interrupt.recv() => tracing::info!(signal = "SIGINT", "stopping"),
        }
    }
}
