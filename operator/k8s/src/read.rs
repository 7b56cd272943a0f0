//! Reads of single objects that are not worth a watch: the config maps that users name.
//!
//! An answer, also that there is no such object, is kept for a while, so that a thousand ModelDeployments with one
//! config cost one read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use kube::api::Api;
use operator_core::ConfigMapView;
use tokio::time::Instant;

use crate::error::{Call, Error};
use crate::retry::RetryPolicy;
use crate::watch::Key;

/// How long a config map that is there is not asked for again.
const PRESENT_FOR: Duration = Duration::from_secs(60);
/// How long one that is not there.
const ABSENT_FOR: Duration = Duration::from_secs(5);
/// Answers that are kept.
const KEPT_MAX: usize = 1024;

type Kept = (Instant, Option<Arc<ConfigMapView>>);

/// Reads config maps.
#[derive(Clone)]
pub struct Reader {
    client: Client,
    kept: Arc<Mutex<HashMap<Key, Kept>>>,
}

impl Reader {
    /// A reader that keeps nothing yet.
    pub fn new(client: Client) -> Self {
        Reader {
            client,
            kept: Arc::default(),
        }
    }

    /// A config map by name; none when there is none.
    ///
    /// # Errors
    /// When the API server refuses or does not answer.
    pub async fn config_map(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Arc<ConfigMapView>>, Error> {
        let key = Key::new(namespace, name);
        let now = Instant::now();
        if let Some((until, view)) = self
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
            && *until > now
        {
            return Ok(view.clone());
        }
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let call = Call::on("get", "ConfigMap", namespace, name);
        let found = RetryPolicy::CALL.run(&call, || api.get_opt(name)).await?;
        let view = found.map(|map| Arc::new(ConfigMapView::of(&map)));
        let keep_for = if view.is_some() {
            PRESENT_FOR
        } else {
            ABSENT_FOR
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_MAX {
            kept.retain(|_, (until, _)| *until > now);
        }
        if kept.len() < KEPT_MAX {
            kept.insert(key, (now + keep_for, view.clone()));
        }
        Ok(view)
    }
}
