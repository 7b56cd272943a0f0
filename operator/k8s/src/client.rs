//! The connection to the API server.

use std::path::Path;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::error::{Call, Error};

/// How long opening a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client from the environment: `KUBECONFIG`, `~/.kube/config`, or the service account of the pod. Also the namespace
/// that the environment names.
///
/// # Errors
/// When there is no configuration, or it cannot be used; says what was tried.
pub async fn connect() -> Result<(Client, String), Error> {
    let call = call("from KUBECONFIG or the pod's service account");
    let config = Config::infer()
        .await
        .map_err(|error| failed(&call, error.to_string()))?;
    client_of(config, call)
}

/// A client as kubectl makes one: from `kubeconfig`, else from `KUBECONFIG` or `~/.kube/config`; with `context`, else
/// with the current one. Also the namespace of that context.
///
/// # Errors
/// When there is no configuration, or it cannot be used.
pub async fn connect_as(
    kubeconfig: Option<&Path>,
    context: Option<&str>,
) -> Result<(Client, String), Error> {
    let from = kubeconfig.map_or("KUBECONFIG or ~/.kube/config".into(), |path| {
        path.display().to_string()
    });
    let call = call(&format!("from {from}"));
    let read = match kubeconfig {
        Some(path) => Kubeconfig::read_from(path),
        None => Kubeconfig::read(),
    };
    let options = KubeConfigOptions {
        context: context.map(str::to_owned),
        ..KubeConfigOptions::default()
    };
    let read = read.map_err(|error| failed(&call, error.to_string()))?;
    let config = Config::from_custom_kubeconfig(read, &options)
        .await
        .map_err(|error| failed(&call, error.to_string()))?;
    client_of(config, call)
}

fn call(name: &str) -> Call {
    Call {
        verb: "configure",
        kind: "client",
        name: name.into(),
    }
}

fn failed(call: &Call, message: String) -> Error {
    Error::Http {
        call: call.clone(),
        message,
    }
}

fn client_of(mut config: Config, call: Call) -> Result<(Client, String), Error> {
    // `retry` repeats, within bounds; kube's own layer would go on for minutes.
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    let namespace = config.default_namespace.clone();
    let client = Client::try_from(config).map_err(|source| Error::Api {
        call,
        source: Box::new(source),
    })?;
    Ok((client, namespace))
}
