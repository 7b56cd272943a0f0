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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::standin::{api_server, refuses, says};
    use serde_json::json;

    fn config() -> crate::standin::Answer {
        says(
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "d"}}),
        )
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_kept_for_a_while_and_that_there_is_none_for_less() {
        let (client, log) = api_server(|number, _| match number {
            0 => refuses(404, "NotFound"),
            _ => config(),
        });
        let reader = Reader::new(client);
        let mut asked = Vec::new();
        for seconds in [0, 4, 2, 50, 11] {
            tokio::time::advance(Duration::from_secs(seconds)).await;
            let found = reader.config_map("d", "c").await.expect("an answer");
            asked.push((log.count(), found.is_some()));
        }
        let there = |count| (count, true);
        assert_eq!(
            asked,
            [(1, false), (1, false), there(2), there(2), there(3)]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_not_kept_and_what_is_kept_is_bounded() {
        let (client, log) = api_server(|number, _| match number {
            0 => refuses(403, "Forbidden"),
            _ => config(),
        });
        let reader = Reader::new(client);
        reader.config_map("d", "c").await.expect_err("refused");
        for number in 0..2 * KEPT_MAX {
            let name = format!("c-{number}");
            reader.config_map("d", &name).await.expect("an answer");
        }
        let kept = || reader.kept.lock().expect("a lock").len();
        assert_eq!((kept(), log.count()), (KEPT_MAX, 2 * KEPT_MAX + 1));
        tokio::time::advance(2 * PRESENT_FOR).await;
        reader.config_map("d", "c").await.expect("an answer");
        assert_eq!(kept(), 1, "what is old makes room");
    }
}
