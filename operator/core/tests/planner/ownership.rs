//! Children that nothing controls are taken over as they are, and what something else controls is let alone.

use std::sync::Arc;

use crate::common::*;
use operator_core::snapshot::PodPhase;
use operator_core::{Action, Controller, Flaw, Kind, Plan, check, names, replicas};
use serde_json::json;

fn three() -> Story {
    story(deployment("m", json!({"replicas": 3})))
        .on([node("a", "8", "16Gi"), node("b", "8", "16Gi")])
        .inspected()
        .running()
}

/// The ModelDeployment is deleted with `--cascade=orphan` and created again.
fn orphaned(mut story: Story) -> Story {
    let snapshot = &mut story.snapshot;
    let mut again = (*snapshot.deployment).clone();
    again.metadata.uid = Some("another-uid".into());
    again.status = None;
    snapshot.deployment = Arc::new(again);
    for pod in &mut snapshot.pods {
        Arc::make_mut(pod).controller = Controller::default();
    }
    for map in &mut snapshot.config_maps {
        Arc::make_mut(map).controller = Controller::default();
    }
    Arc::make_mut(snapshot.service.as_mut().unwrap())
        .metadata
        .owner_references = None;
    Arc::make_mut(snapshot.disruption_budget.as_mut().unwrap())
        .metadata
        .owner_references = None;
    story
}

fn adopted(plan: &Plan, of: Kind) -> Vec<&str> {
    let adopted = plan.actions.iter().filter_map(|action| match action {
        Action::Adopt {
            kind, name, owner, ..
        } if *kind == of => {
            assert_eq!(owner.uid, "another-uid");
            assert_eq!(owner.controller, Some(true));
            Some(name.as_str())
        }
        _ => None,
    });
    adopted.collect()
}

#[test]
fn children_that_were_left_behind_are_adopted_and_serve_on() {
    let story = orphaned(three());
    let plan = story.plan();
    assert_eq!(adopted(&plan, Kind::Pod).len(), 3, "{plan}");
    assert_eq!(adopted(&plan, Kind::ConfigMap).len(), 2, "{plan}");
    let written = actions(&plan);
    assert_eq!(
        written[5..],
        ["apply Service m", "apply PodDisruptionBudget m"],
        "adopted first, and no pod is made or removed"
    );
    assert_eq!(condition(&plan, "Ready").1, "AllReplicasReady");
    let told = plan.events.iter().find(|it| it.reason == "ChildrenAdopted");
    let note = &told.unwrap().note;
    assert!(note.contains("adopted m-0-"), "{note}");
    // It is theirs now: there is nothing left to do.
    let story = story.after(&plan, |_| ());
    assert_eq!(actions(&story.plan()), Vec::<String>::new());
}

#[test]
fn a_budget_is_adopted_also_while_there_are_no_pods() {
    let mut story = orphaned(three());
    story.snapshot.pods.clear();
    let story = story.edited(json!({"replicas": 0}));
    let plan = story.plan();
    let budget = "apply PodDisruptionBudget m".to_owned();
    assert!(actions(&plan).contains(&budget), "{plan}");
    let plan = story.after(&plan, |_| ()).plan();
    assert_eq!(actions(&plan), Vec::<String>::new());
}

#[test]
fn what_a_plan_removes_anyway_is_not_adopted_before() {
    let story = orphaned(three().replica(2, |pod| {
        pod.labels.insert(names::SERVING, "false".into());
        pod.ready = false;
    }));
    let plan = story.plan();
    let leaves = story.name_of(2);
    assert!(actions(&plan).contains(&format!("delete Pod {leaves}")));
    assert!(!adopted(&plan, Kind::Pod).contains(&leaves.as_str()));
    assert_eq!(adopted(&plan, Kind::Pod).len(), 2, "{plan}");
    // Nor one that is being deleted.
    let story = orphaned(three().replica(0, |pod| pod.deleting = true));
    assert_eq!(adopted(&story.plan(), Kind::Pod).len(), 2);
}

#[test]
fn a_pod_of_another_controller_is_no_replica_and_is_never_written() {
    let mut story = three().replica(1, |pod| {
        pod.controller = Controller::Other;
    });
    let foreign = story.name_of(1);
    for shape in [answers, |pod: &mut operator_core::PodView| {
        fails(pod, ago(900));
    }] {
        story = story.replica(1, shape);
        let plan = story.plan();
        // Its index stays taken, so that no two pods of one index ever run.
        assert_eq!(pod_actions(&plan), ["create Pod m-3-0"], "{plan}");
        assert_eq!(plan.status.ready_replicas, Some(2));
        assert_eq!(adopted(&plan, Kind::Pod), Vec::<&str>::new());
    }
    let observed = replicas::observe(&story.snapshot);
    let it = observed.iter().find(|it| it.pod.name == foreign).unwrap();
    assert_eq!(it.state, replicas::State::Leaving);
    // Not even when none is wanted.
    let plan = story.clone().edited(json!({"replicas": 0})).plan();
    assert!(plan.actions.iter().all(|it| it.target().1 != foreign));

    let mut plan = story.plan();
    plan.actions.push(Action::Delete {
        kind: Kind::Pod,
        name: foreign.clone(),
        uid: format!("uid-{foreign}"),
        if_silent: None,
    });
    let flaws = check(&plan, &story.snapshot, &settings());
    assert_eq!(flaws, [Flaw::Foreign(foreign)]);
}

/// It may have been left behind, which is not seen yet: a pod in its place might be one too many.
#[test]
fn what_one_that_is_gone_still_controls_is_waited_for() {
    let mut story = three().replica(1, |pod| {
        pod.controller = Controller::with_uid("one-that-is-gone");
    });
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), Vec::<String>::new(), "{plan}");
    assert_eq!(plan.status.ready_replicas, Some(2));
    // The garbage collector comes for it.
    let name = story.name_of(1);
    story.pod(&name, |pod| pod.deleting = true);
    assert_eq!(pod_actions(&story.plan()), ["create Pod m-3-0"]);
    // Or it was left behind.
    story.pod(&name, |pod| {
        pod.deleting = false;
        pod.controller = Controller::Nothing;
    });
    let plan = story.plan();
    assert_eq!(actions(&plan), [format!("adopt Pod {name}")]);
    assert_eq!(plan.status.ready_replicas, Some(3));
}

#[test]
fn an_inspection_pod_of_another_life_tells_nothing_and_keeps_its_name() {
    let story = story(deployment("m", json!({}))).on([node("a", "8", "16Gi")]);
    let mut story = story.after(&story.plan(), answers);
    let name = story.snapshot.pods[0].name.clone();
    story.pod(&name, |pod| {
        pod.controller = Controller::with_uid("one-that-is-gone");
        assert_eq!(pod.phase, PodPhase::Succeeded);
    });
    let plan = story.plan();
    assert_eq!(condition(&plan, "ModelInspected").1, "Inspecting");
    assert_eq!(actions(&plan)[0], format!("create Pod {name}-1"));
    assert!(plan.actions.iter().all(|it| it.target().1 != name));
}

#[test]
fn a_service_is_adopted_only_with_the_labels_of_a_child() {
    let reason_with = |change: fn(&mut Story)| {
        let mut story = orphaned(three());
        change(&mut story);
        let plan = story.plan();
        (condition(&plan, "Planned").1, plan)
    };
    let (reason, plan) = reason_with(|_| ());
    assert_eq!(reason, "FitFound");
    let applied = plan.actions.iter().find_map(|action| match action {
        Action::Apply(operator_core::Object::Service(service)) => Some(service),
        _ => None,
    });
    let owners = applied.unwrap().metadata.owner_references.clone();
    assert_eq!(owners.unwrap()[0].uid, "another-uid");

    for key in [names::MANAGED_BY, names::MODEL_DEPLOYMENT] {
        let mut story = orphaned(three());
        let service = Arc::make_mut(story.snapshot.service.as_mut().unwrap());
        let labels = service.metadata.labels.as_mut().unwrap();
        labels.insert(key.into(), "somebody".into());
        assert_eq!(condition(&story.plan(), "Planned").1, "NameTaken", "{key}");
    }
    // Nor one that something else controls, whatever its labels are.
    let (reason, _) = reason_with(|story| {
        let service = Arc::make_mut(story.snapshot.service.as_mut().unwrap());
        service.metadata.owner_references = three()
            .snapshot
            .service
            .unwrap()
            .metadata
            .owner_references
            .clone();
    });
    assert_eq!(reason, "NameTaken");
}

#[test]
fn whoever_asks_what_would_be_without_a_uid_sees_its_replicas() {
    let mut story = three();
    let mut supposed = (*story.snapshot.deployment).clone();
    supposed.metadata.uid = None;
    story.snapshot.deployment = Arc::new(supposed);
    assert_eq!(replicas::observe(&story.snapshot).len(), 3);
    assert!(
        replicas::observe(&story.snapshot)
            .iter()
            .all(replicas::Replica::is_ready)
    );
}
