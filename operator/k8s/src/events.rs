//! Events on objects (`events.k8s.io/v1`): one per distinct message, counted when it repeats, bounded in number.
//!
//! A recorder that is asked to say the same thing again within [`REPEAT_WINDOW`] writes nothing more than a higher
//! count, at most once a minute. The name of an event is a hash of what it says and the hour, so that an operator that
//! restarts meets its own event (409) and does not write a twin. Losing an event must never fail a pass: the queue is
//! bounded, and what does not fit is counted and dropped.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::{Event as EventObject, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::FIELD_MANAGER;
use crate::error::{Call, Category};
use crate::retry::RetryPolicy;

/// How long the same message on the same object counts as a repetition.
pub const REPEAT_WINDOW: Duration = Duration::from_secs(600);
/// How often the count of a repetition is written at most.
const COUNT_PERIOD: Duration = Duration::from_secs(60);
/// Messages that wait to be written.
const QUEUE_MAX: usize = 1024;
/// Messages that are remembered.
const REMEMBERED_MAX: usize = 4096;
/// New messages about one object within [`REPEAT_WINDOW`].
const PER_OBJECT_MAX: u32 = 60;
/// What the API server accepts.
const NOTE_BYTES_MAX: usize = 1024;

/// Whether someone should look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// Something happened.
    Normal,
    /// Someone should look.
    Warning,
}

/// Something to say about an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// The object.
    pub regarding: ObjectReference,
    /// Normal or Warning.
    pub severity: Severity,
    /// PascalCase, from a closed set.
    pub reason: String,
    /// What was done or tried, PascalCase.
    pub action: String,
    /// The sentence.
    pub note: String,
}

/// Hands messages to the writer; cheap to clone, never waits.
#[derive(Clone, Debug)]
pub struct Recorder {
    queue: mpsc::Sender<Message>,
    dropped: Arc<AtomicU64>,
}

impl Recorder {
    /// Queues a message, or counts it as dropped when the queue is full.
    pub fn say(&self, message: Message) {
        if self.queue.try_send(message).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Messages lost because the queue was full, an object was too noisy, or the API server refused them.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// Writes queued messages.
pub struct Writer {
    client: Client,
    instance: String,
    queue: mpsc::Receiver<Message>,
    dropped: Arc<AtomicU64>,
    memory: Memory,
}

/// A recorder and its writer; `instance` names this process.
pub fn recorder(client: Client, instance: &str) -> (Recorder, Writer) {
    let (sender, queue) = mpsc::channel(QUEUE_MAX);
    let dropped = Arc::new(AtomicU64::new(0));
    let recorder = Recorder {
        queue: sender,
        dropped: Arc::clone(&dropped),
    };
    (
        recorder,
        Writer {
            client,
            instance: instance.to_string(),
            queue,
            dropped,
            memory: Memory::default(),
        },
    )
}

impl Writer {
    /// Writes until every [`Recorder`] is gone.
    pub async fn run(mut self) {
        while let Some(message) = self.queue.recv().await {
            let key = key_of(&message);
            let regarding = message.regarding.uid.clone().unwrap_or_default();
            let written = match self.memory.note(key, &regarding, Instant::now()) {
                Verdict::New => self.create(key, &message).await,
                Verdict::Count(count) => self.count(key, &message, count).await,
                Verdict::Quiet => continue,
                Verdict::TooMany => Err(()),
            };
            if written.is_err() {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    async fn create(&mut self, key: u64, message: &Message) -> Result<(), ()> {
        let now = Timestamp::now();
        let name = event_name(message, key, now);
        let namespace = message
            .regarding
            .namespace
            .clone()
            .unwrap_or_else(|| "default".into());
        let event = self.object(message, &name, &namespace, now);
        self.memory.named(key, name.clone());
        let api: Api<EventObject> = Api::namespaced(self.client.clone(), &namespace);
        let call = Call::on("create", "Event", &namespace, &name);
        let parameters = PostParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PostParams::default()
        };
        match RetryPolicy::CALL
            .run(&call, || api.create(&parameters, &event))
            .await
        {
            Ok(_) => Ok(()),
            // Said before a restart; it stands.
            Err(error) if error.category() == Category::AlreadyExists => Ok(()),
            Err(error) => {
                tracing::warn!(error = %error, reason = %message.reason, "event not written");
                Err(())
            }
        }
    }

    async fn count(&self, key: u64, message: &Message, count: i32) -> Result<(), ()> {
        let Some(name) = self.memory.name_of(key) else {
            return Err(());
        };
        let namespace = message
            .regarding
            .namespace
            .clone()
            .unwrap_or_else(|| "default".into());
        let api: Api<EventObject> = Api::namespaced(self.client.clone(), &namespace);
        let series = EventSeries {
            count,
            last_observed_time: MicroTime(Timestamp::now()),
        };
        let patch = Patch::Merge(serde_json::json!({ "series": series }));
        let call = Call::on("patch", "Event", &namespace, &name);
        let parameters = PatchParams {
            field_manager: Some(FIELD_MANAGER.into()),
            ..PatchParams::default()
        };
        match RetryPolicy::ONCE
            .run(&call, || api.patch(&name, &parameters, &patch))
            .await
        {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::debug!(error = %error, "event not counted");
                Err(())
            }
        }
    }

    fn object(
        &self,
        message: &Message,
        name: &str,
        namespace: &str,
        now: Timestamp,
    ) -> EventObject {
        EventObject {
            metadata: ObjectMeta {
                name: Some(name.into()),
                namespace: Some(namespace.into()),
                ..ObjectMeta::default()
            },
            action: Some(message.action.clone()),
            reason: Some(message.reason.clone()),
            note: Some(cut(&message.note, NOTE_BYTES_MAX)),
            regarding: Some(message.regarding.clone()),
            reporting_controller: Some("cachalot.dev/operator".into()),
            reporting_instance: Some(cut(&self.instance, 128)),
            type_: Some(match message.severity {
                Severity::Normal => "Normal".into(),
                Severity::Warning => "Warning".into(),
            }),
            event_time: Some(MicroTime(now)),
            ..EventObject::default()
        }
    }
}

/// What was said lately; decides what is written.
#[derive(Debug, Default)]
struct Memory {
    said: HashMap<u64, Said>,
    per_object: HashMap<String, (Instant, u32)>,
}

#[derive(Debug)]
struct Said {
    name: String,
    count: i32,
    last: Instant,
    counted: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    New,
    Count(i32),
    Quiet,
    TooMany,
}

impl Memory {
    fn note(&mut self, key: u64, regarding: &str, now: Instant) -> Verdict {
        self.forget(now);
        if let Some(said) = self.said.get_mut(&key) {
            said.count = said.count.saturating_add(1);
            said.last = now;
            if now.duration_since(said.counted) < COUNT_PERIOD {
                return Verdict::Quiet;
            }
            said.counted = now;
            return Verdict::Count(said.count);
        }
        let (since, count) = self
            .per_object
            .entry(regarding.to_string())
            .or_insert((now, 0));
        if now.duration_since(*since) > REPEAT_WINDOW {
            (*since, *count) = (now, 0);
        }
        *count += 1;
        if *count > PER_OBJECT_MAX {
            return Verdict::TooMany;
        }
        self.said.insert(
            key,
            Said {
                name: String::new(),
                count: 1,
                last: now,
                counted: now,
            },
        );
        Verdict::New
    }

    fn named(&mut self, key: u64, name: String) {
        if let Some(said) = self.said.get_mut(&key) {
            said.name = name;
        }
    }

    fn name_of(&self, key: u64) -> Option<String> {
        self.said
            .get(&key)
            .map(|said| said.name.clone())
            .filter(|name| !name.is_empty())
    }

    fn forget(&mut self, now: Instant) {
        if self.said.len() < REMEMBERED_MAX && self.per_object.len() < REMEMBERED_MAX {
            self.said
                .retain(|_, said| now.duration_since(said.last) <= REPEAT_WINDOW);
            return;
        }
        // Full: the older half goes. Said again, it is a new event, which is only untidy.
        let mut ages: Vec<Instant> = self.said.values().map(|said| said.last).collect();
        ages.sort_unstable();
        let middle = ages.get(ages.len() / 2).copied().unwrap_or(now);
        self.said.retain(|_, said| said.last > middle);
        self.per_object
            .retain(|_, (since, _)| now.duration_since(*since) <= REPEAT_WINDOW);
        if self.per_object.len() >= REMEMBERED_MAX {
            self.per_object.clear();
        }
    }
}

/// FNV-1a, because the name of an event has to be the same in the next process.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

fn key_of(message: &Message) -> u64 {
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    let Message {
        regarding,
        severity,
        reason,
        action,
        note,
    } = message;
    regarding.uid.hash(&mut hasher);
    regarding.namespace.hash(&mut hasher);
    regarding.name.hash(&mut hasher);
    severity.hash(&mut hasher);
    reason.hash(&mut hasher);
    action.hash(&mut hasher);
    note.hash(&mut hasher);
    hasher.finish()
}

/// The same message within the same hour has the same name, whichever process says it.
fn event_name(message: &Message, key: u64, now: Timestamp) -> String {
    let object = cut(message.regarding.name.as_deref().unwrap_or("unknown"), 200);
    format!("{object}.{:08x}{key:016x}", now.as_second() / 3600)
}

/// The first `bytes_max` bytes, at a character's boundary.
fn cut(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_string();
    }
    let mut end = bytes_max.saturating_sub('…'.len_utf8());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(note: &str) -> Message {
        Message {
            regarding: ObjectReference {
                name: Some("m".into()),
                uid: Some("u".into()),
                ..ObjectReference::default()
            },
            severity: Severity::Normal,
            reason: "ReplicaReady".into(),
            action: "Observe".into(),
            note: note.into(),
        }
    }

    #[test]
    fn the_same_message_is_written_once_and_then_counted_once_a_minute() {
        let mut memory = Memory::default();
        let start = Instant::now();
        let key = key_of(&message("a"));
        assert_eq!(memory.note(key, "u", start), Verdict::New);
        for second in 1..60 {
            assert_eq!(
                memory.note(key, "u", start + Duration::from_secs(second)),
                Verdict::Quiet
            );
        }
        assert_eq!(
            memory.note(key, "u", start + Duration::from_secs(60)),
            Verdict::Count(61)
        );
    }

    #[test]
    fn another_note_is_another_event() {
        assert_ne!(key_of(&message("a")), key_of(&message("b")));
    }

    #[test]
    fn after_the_window_the_same_message_is_new_again() {
        let mut memory = Memory::default();
        let start = Instant::now();
        assert_eq!(memory.note(1, "u", start), Verdict::New);
        assert_eq!(
            memory.note(1, "u", start + REPEAT_WINDOW + Duration::from_secs(1)),
            Verdict::New
        );
    }

    #[test]
    fn an_object_that_says_too_much_is_cut_off_and_others_are_not() {
        let mut memory = Memory::default();
        let start = Instant::now();
        for key in 0..u64::from(PER_OBJECT_MAX) {
            assert_eq!(memory.note(key, "noisy", start), Verdict::New);
        }
        assert_eq!(memory.note(9999, "noisy", start), Verdict::TooMany);
        assert_eq!(memory.note(10_000, "quiet", start), Verdict::New);
    }

    #[test]
    fn memory_stays_bounded() {
        let mut memory = Memory::default();
        let start = Instant::now();
        for key in 0..50_000 {
            memory.note(
                key,
                &format!("object-{key}"),
                start + Duration::from_millis(key),
            );
        }
        assert!(memory.said.len() <= REMEMBERED_MAX, "{}", memory.said.len());
        assert!(
            memory.per_object.len() <= REMEMBERED_MAX,
            "{}",
            memory.per_object.len()
        );
    }

    #[test]
    fn a_restarted_operator_gives_the_same_name_within_the_hour() {
        let message = message("a");
        let now: Timestamp = "2026-11-24T04:20:00Z".parse().expect("a time");
        let later: Timestamp = "2026-11-24T04:59:00Z".parse().expect("a time");
        let name = event_name(&message, key_of(&message), now);
        assert_eq!(name, event_name(&message, key_of(&message), later));
        // Fixed on purpose: a change here makes twins after an upgrade.
        assert!(name.starts_with("m.") && name.len() == 2 + 24, "{name}");
    }

    #[test]
    fn long_notes_are_cut_at_a_character() {
        let cut = cut(&"ü".repeat(2000), NOTE_BYTES_MAX);
        assert!(cut.len() <= NOTE_BYTES_MAX && cut.ends_with('…'));
    }
}
