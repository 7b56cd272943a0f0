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
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Resource;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::guard::Guarded;
use crate::retry::jitter;
use lists::Lists;

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

    /// Whether both share their text; two that do not may be equal still.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.name, &other.name) && Arc::ptr_eq(&self.namespace, &other.namespace)
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
#[derive(Clone, Debug, PartialEq)]
pub struct Malformed {
    /// Its uid, for events about it.
    pub uid: String,
    /// The generation that is not understood.
    pub generation: Option<i64>,
    /// The conditions in its status; none where they are not known.
    pub conditions: Option<Vec<Condition>>,
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
    entries: RwLock<BTreeMap<Key, Held<V>>>,
    deletions: Mutex<Deletions>,
    listing: Mutex<Listing>,
    ready: AtomicBool,
    errors: AtomicU64,
    /// How often something in it changed.
    changes: AtomicU64,
    /// The last interruption in words.
    trouble: Mutex<Option<String>>,
}

/// An entry, and the newest version seen of it.
#[derive(Debug)]
pub struct Held<V> {
    entry: Entry<V>,
    version: u64,
}

impl<V> Deref for Held<V> {
    type Target = Entry<V>;

    fn deref(&self) -> &Entry<V> {
        &self.entry
    }
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
            deletions: Mutex::default(),
            listing: Mutex::default(),
            ready: AtomicBool::new(false),
            errors: AtomicU64::new(0),
            changes: AtomicU64::new(0),
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

    /// How often something in it changed: who saw all of it at this count has nothing new to see.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// What last interrupted the watch.
    pub fn trouble(&self) -> Option<String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.clone()
    }

    /// The content, for as long as the guard lives. A panic elsewhere does not make it unreadable.
    pub fn read(&self) -> RwLockReadGuard<'_, BTreeMap<Key, Held<V>>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn listing(&self) -> MutexGuard<'_, Listing> {
        self.listing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A list begins to be read. What an earlier one left in doubt stays so until this one is complete.
    fn begin_list(&self) {
        self.listing().written = Some(HashSet::new());
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
        self.read().get(key).map(|held| held.entry.clone())
    }

    /// The same key, with the texts that are held already: of the object, or else the namespace of its neighbour.
    fn held(&self, key: Key) -> Key {
        let entries = self.read();
        match entries.range(..=&key).next_back() {
            Some((held, _)) if *held == key => held.clone(),
            Some((near, _)) if near.namespace == key.namespace => Key {
                namespace: Arc::clone(&near.namespace),
                ..key
            },
            _ => key,
        }
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
        if let Some(before) = self.swap(key, version, after.as_ref()) {
            tell(key, before.as_ref(), after.as_ref(), changed);
        }
    }

    /// What was there before; none when the news is older than what is known.
    fn swap(&self, key: &Key, version: u64, after: Option<&Entry<V>>) -> Option<Option<Entry<V>>> {
        // Both locks are held until the value is in, so that the two never disagree.
        let mut deletions = self.deletions();
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let known = entries.get(key).map(|held| held.version);
        if !deletions.is_news(key, known, version, after.is_none()) {
            return None;
        }
        let before = match after {
            Some(entry) => {
                let entry = entry.clone();
                entries.insert(key.clone(), Held { entry, version })
            }
            None => entries.remove(key),
        };
        self.changes.fetch_add(1, Ordering::Release);
        Some(before.map(|held| held.entry))
    }

    fn deletions(&self) -> MutexGuard<'_, Deletions> {
        self.deletions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn forget_all(&self) {
        self.keep_only(&HashSet::new(), &|_| ());
    }

    /// A list that names nothing, with what happens while it is read.
    #[cfg(test)]
    pub(crate) fn miss(&self, meanwhile: impl FnOnce()) {
        self.begin_list();
        meanwhile();
        self.forget_all();
    }

    /// Drops what a complete list did not name. What was written meanwhile is in doubt: the list may be older than it.
    fn keep_only(&self, listed: &HashSet<Key>, changed: &impl Fn(Change<'_, V>)) {
        // What an earlier list left in doubt was written before this one began: named, it is known again, else it is gone.
        self.listing().doubted.clear();
        let gone: Vec<Key> = self
            .read()
            .keys()
            .filter(|key| !listed.contains(key))
            .cloned()
            .collect();
        for key in gone {
            let before = {
                // Nobody sees that it is missing before it is in doubt, and a write of ours comes before both or after both.
                let mut listing = self.listing();
                let before = self.swap(&key, u64::MAX, None);
                let written = listing.written.as_ref();
                if written.is_some_and(|written| written.contains(&key)) {
                    listing.doubted.insert(key.clone());
                    self.deletions().may_return(&key);
                }
                before
            };
            if let Some(before) = before {
                tell(&key, before.as_ref(), None, changed);
            }
        }
        self.listing().written = None;
    }
}

fn tell<V: PartialEq>(
    key: &Key,
    before: Option<&Entry<V>>,
    after: Option<&Entry<V>>,
    changed: &impl Fn(Change<'_, V>),
) {
    if before != after {
        changed(Change { key, before, after });
    }
}

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
    let mut lists = Lists::streamed();
    loop {
        let events = watcher::watcher(api.clone(), lists.configure(config.clone()));
        let mut events = std::pin::pin!(events.backoff(Pauses::default()));
        let mut listed = HashSet::new();
        while let Some(event) = events.next().await {
            if let Some(why) = lists.turn_to_pages(&event) {
                tracing::info!(
                    kind = mirror.kind,
                    why,
                    "lists are read in pages from now on"
                );
                break;
            }
            take_in(&mirror, event, &mut listed, &trim, &changed);
        }
    }
}

/// Puts into the mirror what a watch told; `listed` are the objects of a list that is being read.
fn take_in<K, V>(
    mirror: &Mirror<V>,
    event: watcher::Result<Event<Guarded<K>>>,
    listed: &mut HashSet<Key>,
    trim: &impl Fn(K) -> Result<Option<V>, String>,
    changed: &impl Fn(Change<'_, V>),
) where
    K: Resource<DynamicType = ()>,
    V: PartialEq,
{
    match event {
        Ok(Event::Init) => {
            listed.clear();
            mirror.begin_list();
        }
        Ok(Event::InitApply(object)) => {
            let (key, version) = (mirror.held(key_of(&object)), version_of(&object));
            mirror.put(&key, version, entry_of(object, trim), changed);
            listed.insert(key);
        }
        Ok(Event::InitDone) => {
            mirror.keep_only(listed, changed);
            *listed = HashSet::new();
            if !mirror.ready.swap(true, Ordering::AcqRel) {
                tracing::debug!(
                    kind = mirror.kind,
                    objects = mirror.read().len(),
                    "first list complete"
                );
            }
        }
        Ok(Event::Apply(object)) => {
            let (key, version) = (mirror.held(key_of(&object)), version_of(&object));
            mirror.put(&key, version, entry_of(object, trim), changed);
        }
        Ok(Event::Delete(object)) => {
            mirror.put(&key_of(&object), version_of(&object), None, changed);
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

/// An object that does not parse is guarded; one that parses but makes no sense to `trim` is treated alike.
fn entry_of<K, V>(
    object: Guarded<K>,
    trim: impl Fn(K) -> Result<Option<V>, String>,
) -> Option<Entry<V>>
where
    K: Resource<DynamicType = ()>,
{
    let malformed = match object.0 {
        Ok(object) => {
            let metadata = object.meta();
            let (uid, generation) = (metadata.uid.clone(), metadata.generation);
            match trim(object) {
                Ok(value) => return value.map(|value| Ok(Arc::new(value))),
                Err(message) => Malformed {
                    uid: uid.unwrap_or_default(),
                    generation,
                    conditions: None,
                    message,
                },
            }
        }
        Err(misread) => Malformed {
            uid: misread.metadata.uid.unwrap_or_default(),
            generation: misread.metadata.generation,
            conditions: Some(misread.conditions),
            message: misread.error,
        },
    };
    Some(Err(Arc::new(malformed)))
}

fn key_of<K: Resource>(object: &K) -> Key {
    let metadata = object.meta();
    Key::new(
        metadata.namespace.clone().unwrap_or_default(),
        metadata.name.clone().unwrap_or_default(),
    )
}

/// Puts the API server's answer to a write of ours into the mirror, so that the next pass sees it. `changed` is told of a
/// difference, which the watch will not find any more.
pub fn write_through<K, V>(
    mirror: &Mirror<V>,
    object: K,
    trim: impl Fn(K) -> Result<Option<V>, String>,
    changed: impl Fn(Change<'_, V>),
) where
    K: Resource<DynamicType = ()>,
    V: PartialEq,
{
    let object = Guarded(Ok(object));
    let (key, version) = (mirror.held(key_of(&object)), version_of(&object));
    let after = entry_of(object, trim);
    let before = {
        // Noted and put in one, so that a list which ends meanwhile cannot drop it unnoticed.
        let mut listing = mirror.listing();
        if let Some(written) = &mut listing.written {
            written.insert(key.clone());
        }
        mirror.swap(&key, version, after.as_ref())
    };
    if let Some(before) = before {
        tell(&key, before.as_ref(), after.as_ref(), &changed);
    }
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

/// The versions at which objects were deleted lately.
#[derive(Debug, Default)]
struct Deletions {
    deleted: HashMap<Key, u64>,
    order: VecDeque<Key>,
}

/// Deletions that are remembered.
const DELETED_MAX: usize = 4096;

impl Deletions {
    /// The version that was known when an object was dropped may be told of again.
    fn may_return(&mut self, key: &Key) {
        if let Some(at) = self.deleted.get_mut(key) {
            *at = at.saturating_sub(1);
        }
    }

    /// Whether `version` of `key` is newer than what is known, which is the version that is `held` if there is one;
    /// remembers a deletion if so. `u64::MAX` says that a list did not name the object, which is always news and sets no
    /// version.
    fn is_news(&mut self, key: &Key, held: Option<u64>, version: u64, gone: bool) -> bool {
        let deleted = || self.deleted.get(key).copied();
        let known = held.or_else(deleted).unwrap_or(0);
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
            return true;
        }
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

/// How long a watch has to go on before its next failure counts as the first.
const QUIET: Duration = Duration::from_secs(30);

/// Pauses between attempts of a watch: half a second, doubling to ten. An API server that restarts is back within
/// that, and one that is down is not hammered.
#[derive(Debug, Default)]
struct Pauses {
    failed: u32,
    /// When the last pause ended.
    resumed: Option<Instant>,
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let now = Instant::now();
        if self.resumed.is_some_and(|resumed| now > resumed + QUIET) {
            self.failed = 0;
        }
        let base = Duration::from_millis(500) * (1 << self.failed.min(5));
        self.failed = self.failed.saturating_add(1);
        let base = base.min(Duration::from_secs(10));
        let pause = base + base.mul_f64(f64::from(jitter()) / 1024.0);
        self.resumed = Some(now + pause);
        Some(pause)
    }
}

impl Backoff for Pauses {
    /// Asked for at whatever is no error, also at the beginning of a list that then fails: only time tells.
    fn reset(&mut self) {}
}

#[cfg(test)]
mod following;
mod lists;
#[cfg(test)]
mod tests;
