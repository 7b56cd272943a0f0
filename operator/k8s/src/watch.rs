//! A mirror of the objects of one kind, in the form we need and no larger.
//!
//! Each watch turns what arrives into a small value at once and drops the rest, so that a pod costs hundreds of bytes
//! and not tens of kilobytes. An object that cannot be understood is kept as a [`Malformed`] entry and stops nothing.
//! Invariant: a relist replaces the whole content at `InitDone`, so deletions that were missed are caught then; until
//! the first `InitDone` the mirror is not ready and nobody plans on it. The surprise: what the API server answers to our
//! own writes goes into the mirror at once, so that the next pass sees it. Resource versions decide which of two
//! versions is newer (they are ordered since Kubernetes 1.33 says so for its own kinds), and the versions at which
//! objects were deleted are remembered, so that a late answer does not bring one back. What was written while a list was
//! being read may be missing in it and exist: it leaves the mirror in doubt and is read back before anyone plans.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use std::time::Duration;

use futures::StreamExt;
use kube::Resource;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event};
use serde::de::DeserializeOwned;

use crate::guard::Guarded;
use crate::retry::jitter;

/// Namespace and name; the namespace of cluster-wide objects is empty. Shared: a pod's key is held in several places, and
/// there are ten thousand of them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl Key {
    /// A key from its two parts.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Key {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            formatter.write_str(&self.name)
        } else {
            write!(formatter, "{}/{}", self.namespace, self.name)
        }
    }
}

/// An object that is in the cluster but not in a form we know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// Its uid, for events about it.
    pub uid: String,
    /// What is wrong, naming the field.
    pub message: String,
}

/// One entry of a mirror.
pub type Entry<V> = Result<Arc<V>, Arc<Malformed>>;

/// The mirrored objects of one kind.
#[derive(Debug)]
pub struct Mirror<V> {
    /// The kind, for metrics and logs.
    pub kind: &'static str,
    entries: RwLock<BTreeMap<Key, Entry<V>>>,
    /// Newest version seen of each object, also of those deleted lately.
    versions: Mutex<Versions>,
    listing: Mutex<Listing>,
    ready: AtomicBool,
    errors: AtomicU64,
    /// The last interruption in words.
    trouble: Mutex<Option<String>>,
}

/// What a list may have missed.
#[derive(Debug, Default)]
struct Listing {
    /// Objects that answers to our own writes brought in while a list is being read; none while none is.
    written: Option<HashSet<Key>>,
    /// Those of them that the list did not name.
    doubted: BTreeSet<Key>,
}

/// What happened to a mirror: the key and the value before and after.
pub struct Change<'a, V> {
    /// Which object.
    pub key: &'a Key,
    /// Its value before; none when it is new.
    pub before: Option<&'a Entry<V>>,
    /// Its value now; none when it is gone.
    pub after: Option<&'a Entry<V>>,
}

impl<V> Mirror<V> {
    /// An empty mirror that is not ready.
    pub fn new(kind: &'static str) -> Arc<Self> {
        Arc::new(Mirror {
            kind,
            entries: RwLock::default(),
            versions: Mutex::default(),
            listing: Mutex::default(),
            ready: AtomicBool::new(false),
            errors: AtomicU64::new(0),
            trouble: Mutex::default(),
        })
    }

    /// Whether the first list is complete.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Errors of the watch since the start; each is followed by a pause and a new attempt.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    /// What last interrupted the watch.
    pub fn trouble(&self) -> Option<String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.clone()
    }

    /// The content, for as long as the guard lives. A panic elsewhere does not make it unreadable.
    pub fn read(&self) -> RwLockReadGuard<'_, BTreeMap<Key, Entry<V>>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn listing(&self) -> MutexGuard<'_, Listing> {
        self.listing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A list begins to be read.
    fn begin_list(&self) {
        *self.listing() = Listing {
            written: Some(HashSet::new()),
            doubted: BTreeSet::new(),
        };
    }

    /// Objects in doubt that `test` accepts, which are then no longer remembered.
    pub fn take_doubted(&self, test: impl Fn(&Key) -> bool) -> Vec<Key> {
        let mut listing = self.listing();
        let taken: Vec<Key> = listing
            .doubted
            .iter()
            .filter(|key| test(key))
            .cloned()
            .collect();
        for key in &taken {
            listing.doubted.remove(key);
        }
        taken
    }

    /// One object.
    pub fn get(&self, key: &Key) -> Option<Entry<V>> {
        self.read().get(key).cloned()
    }
}

impl<V: PartialEq> Mirror<V> {
    /// Notes an object's new value, or with none that it is gone; older news than what is known is ignored.
    fn put(
        &self,
        key: &Key,
        version: u64,
        after: Option<Entry<V>>,
        changed: &impl Fn(Change<'_, V>),
    ) {
        let mut versions = self.versions.lock().unwrap_or_else(PoisonError::into_inner);
        if !versions.is_news(key, version, after.is_none()) {
            return;
        }
        // The lock on versions is held until the value is in, so that the two never disagree.
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let before = match &after {
            Some(entry) => entries.insert(key.clone(), entry.clone()),
            None => entries.remove(key),
        };
        drop(entries);
        drop(versions);
        if before != after {
            changed(Change {
                key,
                before: before.as_ref(),
                after: after.as_ref(),
            });
        }
    }

    #[cfg(test)]
    pub(crate) fn forget_all(&self) {
        self.keep_only(&HashSet::new(), &|_| ());
    }

    /// Drops what a complete list did not name. What was written meanwhile is in doubt: the list may be older than it.
    fn keep_only(&self, listed: &HashSet<Key>, changed: &impl Fn(Change<'_, V>)) {
        let written = self.listing().written.take().unwrap_or_default();
        let gone: Vec<Key> = self
            .read()
            .keys()
            .filter(|key| !listed.contains(key))
            .cloned()
            .collect();
        for key in gone {
            let is_doubted = written.contains(&key);
            if is_doubted {
                self.listing().doubted.insert(key.clone());
            }
            self.put(&key, u64::MAX, None, changed);
            if is_doubted {
                let mut versions = self.versions.lock().unwrap_or_else(PoisonError::into_inner);
                versions.may_return(&key);
            }
        }
    }
}

/// Objects asked for at once while a list is read: a page is held as text and as whole objects before it is made small.
const PAGE: u32 = 200;

/// Keeps `mirror` equal to the cluster until dropped. `trim` makes the small value, or none for objects that do not
/// matter; `changed` is told of every difference, from this task, and must not block.
pub async fn follow<K, V>(
    mirror: Arc<Mirror<V>>,
    api: Api<Guarded<K>>,
    config: watcher::Config,
    trim: impl Fn(K) -> Result<Option<V>, String>,
    changed: impl Fn(Change<'_, V>),
) where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    V: PartialEq,
{
    let config = config.page_size(PAGE);
    let events = watcher::watcher(api, config).backoff(Pauses::default());
    let mut events = std::pin::pin!(events);
    let mut listed = HashSet::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => {
                listed.clear();
                mirror.begin_list();
            }
            Ok(Event::InitApply(object)) => {
                let (key, version) = (key_of(&object), version_of(&object));
                mirror.put(&key, version, entry_of(object, &trim), &changed);
                listed.insert(key);
            }
            Ok(Event::InitDone) => {
                mirror.keep_only(&listed, &changed);
                listed = HashSet::new();
                if !mirror.ready.swap(true, Ordering::AcqRel) {
                    tracing::debug!(
                        kind = mirror.kind,
                        objects = mirror.read().len(),
                        "first list complete"
                    );
                }
            }
            Ok(Event::Apply(object)) => {
                mirror.put(
                    &key_of(&object),
                    version_of(&object),
                    entry_of(object, &trim),
                    &changed,
                );
            }
            Ok(Event::Delete(object)) => {
                mirror.put(&key_of(&object), version_of(&object), None, &changed)
            }
            Err(error) => {
                mirror.errors.fetch_add(1, Ordering::Relaxed);
                *mirror
                    .trouble
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
                tracing::warn!(kind = mirror.kind, %error, "watch interrupted; it is resumed after a pause");
            }
        }
    }
}

/// An object that does not parse is guarded; one that parses but makes no sense to `trim` is treated alike.
fn entry_of<K, V>(
    object: Guarded<K>,
    trim: impl Fn(K) -> Result<Option<V>, String>,
) -> Option<Entry<V>>
where
    K: Resource<DynamicType = ()>,
{
    let (uid, message) = match object.0 {
        Ok(object) => {
            let uid = object.meta().uid.clone();
            match trim(object) {
                Ok(value) => return value.map(|value| Ok(Arc::new(value))),
                Err(message) => (uid, message),
            }
        }
        Err(invalid) => (invalid.metadata.uid, invalid.error),
    };
    Some(Err(Arc::new(Malformed {
        uid: uid.unwrap_or_default(),
        message,
    })))
}

fn key_of<K: Resource>(object: &K) -> Key {
    let metadata = object.meta();
    Key::new(
        metadata.namespace.clone().unwrap_or_default(),
        metadata.name.clone().unwrap_or_default(),
    )
}

/// Puts the API server's answer to a write of ours into the mirror, so that the next pass sees it.
pub fn write_through<K, V>(
    mirror: &Mirror<V>,
    object: K,
    trim: impl Fn(K) -> Result<Option<V>, String>,
) where
    K: Resource<DynamicType = ()>,
    V: PartialEq,
{
    let object = Guarded(Ok(object));
    // Noted before it is put, so that a list which ends in between cannot drop it unnoticed.
    if let Some(written) = &mut mirror.listing().written {
        written.insert(key_of(&object));
    }
    mirror.put(
        &key_of(&object),
        version_of(&object),
        entry_of(object, trim),
        &|_| (),
    );
}

/// The resource version as a number; 0, which is older than everything, for an API server that uses another form.
fn version_of<K: Resource>(object: &K) -> u64 {
    object
        .meta()
        .resource_version
        .as_deref()
        .and_then(|version| version.parse().ok())
        .unwrap_or(0)
}

/// Newest versions seen.
#[derive(Debug, Default)]
struct Versions {
    present: HashMap<Key, u64>,
    deleted: HashMap<Key, u64>,
    order: VecDeque<Key>,
}

/// Deletions that are remembered.
const DELETED_MAX: usize = 4096;

impl Versions {
    /// The version that was known when an object was dropped may be told of again.
    fn may_return(&mut self, key: &Key) {
        if let Some(at) = self.deleted.get_mut(key) {
            *at = at.saturating_sub(1);
        }
    }

    /// Whether `version` of `key` is newer than what is known; remembers it if so. `u64::MAX` says that a list did not
    /// name the object, which is always news and sets no version.
    fn is_news(&mut self, key: &Key, version: u64, gone: bool) -> bool {
        let known = self
            .present
            .get(key)
            .or_else(|| self.deleted.get(key))
            .copied()
            .unwrap_or(0);
        if version != 0 && version < known {
            return false;
        }
        if !gone {
            if version != 0
                && self
                    .deleted
                    .get(key)
                    .is_some_and(|deleted| version <= *deleted)
            {
                return false;
            }
            self.deleted.remove(key);
            self.present.insert(key.clone(), version);
            return true;
        }
        self.present.remove(key);
        let at = if version == u64::MAX { known } else { version };
        if self.deleted.insert(key.clone(), at).is_none() {
            self.order.push_back(key.clone());
        }
        while self.order.len() > DELETED_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.deleted.remove(&oldest);
            }
        }
        true
    }
}

/// Pauses between attempts of a watch: half a second, doubling to ten. An API server that restarts is back within
/// that, and one that is down is not hammered.
#[derive(Debug, Default)]
struct Pauses {
    failed: u32,
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let base = Duration::from_millis(500) * (1 << self.failed.min(5));
        self.failed = self.failed.saturating_add(1);
        let base = base.min(Duration::from_secs(10));
        Some(base + base.mul_f64(f64::from(jitter()) / 1024.0))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.failed = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;
    use std::cell::RefCell;

    fn parse(json: serde_json::Value) -> Guarded<ConfigMap> {
        serde_json::from_value(json).expect("guarded")
    }

    fn size(object: ConfigMap) -> Result<Option<usize>, String> {
        match object.data {
            None => Ok(None),
            Some(data) if data.contains_key("bad") => Err("data.bad: not allowed".into()),
            Some(data) => Ok(Some(data.len())),
        }
    }

    #[test]
    fn a_malformed_object_is_kept_with_its_reason_and_others_are_not_touched() {
        let mirror = Mirror::<usize>::new("ConfigMap");
        for json in [
            serde_json::json!({"metadata": {"name": "good", "namespace": "d", "uid": "1"}, "data": {"a": "b"}}),
            serde_json::json!({"metadata": {"name": "broken", "namespace": "d", "uid": "2"}, "data": ["not", "a", "map"]}),
            serde_json::json!({"metadata": {"name": "senseless", "namespace": "d", "uid": "3"}, "data": {"bad": ""}}),
        ] {
            let object = parse(json);
            mirror.put(&key_of(&object), 0, entry_of(object, size), &|_| ());
        }
        assert_eq!(mirror.get(&Key::new("d", "good")), Some(Ok(Arc::new(1))));
        let broken = mirror
            .get(&Key::new("d", "broken"))
            .expect("kept")
            .expect_err("malformed");
        assert!(
            broken.uid == "2" && broken.message.contains("map"),
            "{broken:?}"
        );
        let senseless = mirror
            .get(&Key::new("d", "senseless"))
            .expect("kept")
            .expect_err("malformed");
        assert_eq!(senseless.message, "data.bad: not allowed");
    }

    #[test]
    fn only_differences_are_told() {
        let mirror = Mirror::<usize>::new("ConfigMap");
        let key = Key::new("d", "a");
        let told = RefCell::new(Vec::new());
        let changed = |change: Change<'_, usize>| {
            told.borrow_mut()
                .push((change.before.cloned(), change.after.cloned()))
        };
        mirror.put(&key, 1, Some(Ok(Arc::new(1))), &changed);
        mirror.put(&key, 2, Some(Ok(Arc::new(1))), &changed);
        mirror.put(&key, 3, Some(Ok(Arc::new(2))), &changed);
        mirror.put(&key, 4, None, &changed);
        mirror.put(&key, 4, None, &changed);
        let one = || Some(Ok(Arc::new(1)));
        let two = || Some(Ok(Arc::new(2)));
        assert_eq!(
            *told.borrow(),
            vec![(None, one()), (one(), two()), (two(), None)]
        );
    }

    #[test]
    fn a_relist_drops_what_it_does_not_name() {
        let mirror = Mirror::<usize>::new("ConfigMap");
        for name in ["a", "b", "c"] {
            mirror.put(&Key::new("d", name), 1, Some(Ok(Arc::new(1))), &|_| ());
        }
        mirror.keep_only(&HashSet::from([Key::new("d", "b")]), &|_| ());
        assert_eq!(
            mirror
                .read()
                .keys()
                .map(|key| &*key.name)
                .collect::<Vec<_>>(),
            ["b"]
        );
    }

    #[test]
    fn late_and_old_news_are_ignored() {
        let mirror = Mirror::<usize>::new("ConfigMap");
        let key = Key::new("d", "a");
        let value = |value: usize| Some(Ok(Arc::new(value)));
        let now = || mirror.get(&key);
        mirror.put(&key, 10, value(10), &|_| ());
        mirror.put(&key, 9, value(9), &|_| ());
        assert_eq!(now(), value(10));
        mirror.put(&key, 12, None, &|_| ());
        // The answer to a write of ours that arrives after the watch told of the deletion.
        mirror.put(&key, 11, value(11), &|_| ());
        assert_eq!(now(), None);
        // Made anew under the same name.
        mirror.put(&key, 15, value(15), &|_| ());
        assert_eq!(now(), value(15));
        // The watch tells late of the first one's end.
        mirror.put(&key, 12, None, &|_| ());
        assert_eq!(now(), value(15));
    }

    #[test]
    fn an_object_that_a_relist_missed_can_come_back() {
        let mirror = Mirror::<usize>::new("ConfigMap");
        let key = Key::new("d", "a");
        mirror.put(&key, 10, Some(Ok(Arc::new(1))), &|_| ());
        mirror.keep_only(&HashSet::new(), &|_| ());
        assert_eq!(mirror.get(&key), None);
        mirror.put(&key, 11, Some(Ok(Arc::new(2))), &|_| ());
        assert!(mirror.get(&key).is_some());
    }

    fn config_map(name: &str, version: &str) -> ConfigMap {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": name, "namespace": "d", "resourceVersion": version}, "data": {"a": "b"}}))
        .expect("a config map")
    }

    #[test]
    fn what_is_written_while_a_list_is_read_is_doubted_and_may_come_back() {
        let mirror = Mirror::<usize>::new("ConfigMap");
        let (early, late) = (Key::new("d", "early"), Key::new("d", "late"));
        write_through(&mirror, config_map("early", "90"), size);
        // A list of version 100 begins; what was there before it and is not named is gone.
        mirror.begin_list();
        write_through(&mirror, config_map("late", "105"), size);
        mirror.keep_only(&HashSet::new(), &|_| ());
        assert_eq!((mirror.get(&early), mirror.get(&late)), (None, None));
        assert_eq!(mirror.take_doubted(|_| true), vec![late.clone()]);
        assert!(mirror.take_doubted(|_| true).is_empty(), "told once");
        // The watch goes on from version 100 and tells of it as it was written.
        mirror.put(&late, 105, Some(Ok(Arc::new(1))), &|_| ());
        assert!(mirror.get(&late).is_some(), "it would never be seen again");
        // Old news of the one that is gone changes nothing.
        mirror.put(&early, 90, Some(Ok(Arc::new(1))), &|_| ());
        assert_eq!(mirror.get(&early), None);
    }

    #[test]
    fn what_a_list_names_is_not_doubted() {
        let mirror = Mirror::<usize>::new("ConfigMap");
        mirror.begin_list();
        write_through(&mirror, config_map("a", "105"), size);
        mirror.keep_only(&HashSet::from([Key::new("d", "a")]), &|_| ());
        assert!(mirror.get(&Key::new("d", "a")).is_some());
        assert!(mirror.take_doubted(|_| true).is_empty());
    }

    #[test]
    fn remembered_deletions_stay_bounded() {
        let mut versions = Versions::default();
        for number in 0..3 * DELETED_MAX as u64 {
            versions.is_news(&Key::new("d", number.to_string()), number + 1, true);
        }
        assert!(versions.deleted.len() <= DELETED_MAX && versions.order.len() <= DELETED_MAX);
    }

    #[test]
    fn pauses_grow_and_stay_bounded() {
        let mut pauses = Pauses::default();
        let first = pauses.next().expect("always");
        let later = pauses.by_ref().take(100).last().expect("always");
        assert!(first < Duration::from_secs(1), "{first:?}");
        assert!(
            later >= Duration::from_secs(10) && later < Duration::from_secs(14),
            "{later:?}"
        );
        pauses.reset();
        assert!(pauses.next().expect("always") < Duration::from_secs(1));
    }
}
