//! What a mirror makes of news, in order and out of it.

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
    write_through(&mirror, config_map("early", "90"), size, |_| ());
    // A list of version 100 begins; what was there before it and is not named is gone.
    mirror.begin_list();
    write_through(&mirror, config_map("late", "105"), size, |_| ());
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
    write_through(&mirror, config_map("a", "105"), size, |_| ());
    mirror.keep_only(&HashSet::from([Key::new("d", "a")]), &|_| ());
    assert!(mirror.get(&Key::new("d", "a")).is_some());
    assert!(mirror.take_doubted(|_| true).is_empty());
}

#[test]
fn remembered_deletions_stay_bounded() {
    let mut deletions = Deletions::default();
    for number in 0..3 * DELETED_MAX as u64 {
        deletions.is_news(&Key::new("d", number.to_string()), None, number + 1, true);
    }
    assert!(deletions.deleted.len() <= DELETED_MAX && deletions.order.len() <= DELETED_MAX);
}

#[tokio::test(start_paused = true)]
async fn pauses_grow_and_stay_bounded_until_the_watch_went_on_for_a_while() {
    let mut pauses = Pauses::default();
    let first = pauses.next().expect("always");
    let later = pauses.by_ref().take(100).last().expect("always");
    assert!(first < Duration::from_secs(1), "{first:?}");
    assert!(
        later >= Duration::from_secs(10) && later < Duration::from_secs(14),
        "{later:?}"
    );
    // A list begins, which says nothing yet.
    pauses.reset();
    tokio::time::advance(later).await;
    assert!(pauses.next().expect("always") >= Duration::from_secs(10));
    tokio::time::advance(later + 2 * QUIET).await;
    assert!(pauses.next().expect("always") < Duration::from_secs(1));
}

#[test]
fn a_doubt_outlives_the_beginning_of_another_list_and_not_its_end() {
    let mirror = Mirror::<usize>::new("ConfigMap");
    mirror.begin_list();
    write_through(&mirror, config_map("a", "105"), size, |_| ());
    write_through(&mirror, config_map("b", "106"), size, |_| ());
    mirror.keep_only(&HashSet::new(), &|_| ());
    // The watch breaks off and lists anew before anyone has looked.
    mirror.begin_list();
    let a = Key::new("d", "a");
    assert_eq!(mirror.take_doubted(|key| *key == a), [a]);
    mirror.keep_only(&HashSet::new(), &|_| ());
    assert!(mirror.take_doubted(|_| true).is_empty(), "b is gone");
}

#[test]
fn what_is_made_anew_while_a_list_ends_is_doubted_too() {
    let mirror = Mirror::<usize>::new("ConfigMap");
    for name in ["a", "b"] {
        write_through(&mirror, config_map(name, "90"), size, |_| ());
    }
    mirror.begin_list();
    // The list names neither. We make b again while a is being dropped.
    mirror.keep_only(&HashSet::new(), &|change| {
        if change.key.name.as_ref() == "a" {
            write_through(&mirror, config_map("b", "110"), size, |_| ());
        }
    });
    let b = Key::new("d", "b");
    assert_eq!(mirror.take_doubted(|_| true), std::slice::from_ref(&b));
    mirror.put(&b, 110, Some(Ok(Arc::new(1))), &|_| ());
    assert!(mirror.get(&b).is_some(), "it would never be seen again");
}
