//! The connection to the API server.

use std::time::Duration;

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
    let call = Call {
        verb: "configure",
        kind: "client",
        name: "from KUBECONFIG or the pod's service account".into(),
    };
    let failed = |message: String| Error::Http {
        call: call.clone(),
        message,
    };
    let mut config = Config::infer()
        .await
        .map_err(|error| failed(error.to_string()))?;
    // `retry` repeats, within bounds; kube's own layer would go on for minutes.
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    let namespace = config.default_namespace.clone();
    let client = Client::try_from(config).map_err(|source| Error::Api {
        call: call.clone(),
        source: Box::new(source),
    })?;
    Ok((client, namespace))
}
