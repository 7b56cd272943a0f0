//! The objects beside the pods: what stands in front of them, and what groups share.
//!
//! Each is written where it is missing or differs from what is wanted. Invariant: an object of the name that belongs to
//! someone else is never touched; it is told of. One with the labels of a child that nothing controls was left behind, and is
//! applied with its owner like one that differs.

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;

use crate::names;
use crate::objects;
use crate::ownership;
use crate::plan::{Action, Kind, Object, Settings};
use crate::replicas::Replica;
use crate::snapshot::Snapshot;
use crate::validate::ValidDeployment;

/// What the objects of one deployment depend on.
pub(crate) struct Children<'a> {
    pub(crate) valid: &'a ValidDeployment,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) replicas: &'a [Replica<'a>],
    /// Replicas that are wanted.
    pub(crate) wanted: u32,
}

impl Children<'_> {
    /// The Service and the budget.
    ///
    /// # Errors
    /// A name is taken: which, and the way out.
    pub(crate) fn front_door(&self) -> Result<Vec<Action>, String> {
        let snapshot = self.snapshot;
        let (service, budget) = (&snapshot.service, &snapshot.disruption_budget);
        let owners = [
            ("Service", service.as_ref().map(|it| &it.metadata)),
            (
                "PodDisruptionBudget",
                budget.as_ref().map(|it| &it.metadata),
            ),
        ];
        for (kind, metadata) in owners {
            if metadata.is_some_and(|metadata| self.is_foreign(metadata)) {
                return Err(format!(
                    "metadata.name = {}: a {kind} of that name belongs to someone else; delete it or choose another name",
                    self.valid.name
                ));
            }
        }
        let mut actions = Vec::new();
        actions.extend(applied_service(
            service.as_deref(),
            objects::service(self.valid),
        ));
        let ranks = self.replicas.iter().map(|replica| replica.pod.ranks());
        let ranks = ranks.min();
        let wanted = objects::disruption_budget(self.valid, self.wanted, ranks.unwrap_or(1));
        // Without pods there is nothing to keep, and nothing says how many the next replica has.
        let is_right = |found: &PodDisruptionBudget| {
            self.is_owned(&found.metadata) && (ranks.is_none() || covers(found, &wanted))
        };
        if !budget.as_deref().is_some_and(is_right) {
            actions.push(Action::Apply(Object::PodDisruptionBudget(Box::new(wanted))));
        }
        Ok(actions)
    }

    /// The Service that gives ranks their host names, and the network policy that keeps others from them. They are there
    /// while groups are wanted or left.
    ///
    /// # Errors
    /// A name is taken: which, and the way out.
    pub(crate) fn of_groups(
        &self,
        are_wanted: bool,
        settings: &Settings,
    ) -> Result<Vec<Action>, String> {
        let service = self.snapshot.ranks_service.as_deref();
        let policy = self.snapshot.ranks_policy.as_deref();
        let of_service = service.map(|it| (Kind::Service, &it.metadata));
        let of_policy = policy.map(|it| (Kind::NetworkPolicy, &it.metadata));
        if !are_wanted {
            let are_left = self.replicas.iter().any(|it| it.pod.ranks() > 1);
            let found = of_service.into_iter().chain(of_policy);
            let ours = found.filter(|(_, metadata)| !are_left && !self.is_foreign(metadata));
            return Ok(ours.filter_map(removed).collect());
        }
        let needed = of_service
            .into_iter()
            .chain(of_policy.filter(|_| settings.network_policies));
        for (kind, metadata) in needed {
            if self.is_foreign(metadata) {
                return Err(format!(
                    "metadata.name = {}: a {} named {} belongs to someone else, and replicas of several pods need it; delete it or choose another name",
                    self.valid.name,
                    kind.as_str(),
                    names::ranks(&self.valid.name),
                ));
            }
        }
        let mut actions = Vec::new();
        // Before the pods: what they tell each other is nobody else's from the start.
        if settings.network_policies {
            let wanted = objects::ranks_policy(self.valid);
            if !policy.is_some_and(|found| covers(found, &wanted)) {
                actions.push(Action::Apply(Object::NetworkPolicy(Box::new(wanted))));
            }
        }
        let wanted = objects::ranks_service(self.valid);
        actions.extend(applied_service(service, wanted));
        Ok(actions)
    }

    fn is_foreign(&self, metadata: &ObjectMeta) -> bool {
        !self.is_owned(metadata) && !ownership::is_left_behind(metadata, &self.valid.name)
    }

    fn is_owned(&self, metadata: &ObjectMeta) -> bool {
        let mut owners = metadata.owner_references.iter().flatten();
        owners.any(|owner| owner.uid == self.valid.uid)
    }
}

fn applied_service(found: Option<&Service>, wanted: Service) -> Option<Action> {
    let is_right = found.is_some_and(|found| covers(found, &wanted));
    (!is_right).then(|| Action::Apply(Object::Service(Box::new(wanted))))
}

fn removed((kind, metadata): (Kind, &ObjectMeta)) -> Option<Action> {
    Some(Action::Delete {
        kind,
        name: metadata.name.clone()?,
        uid: metadata.uid.clone()?,
        if_silent: None,
    })
}

fn covers(found: &impl Serialize, wanted: &impl Serialize) -> bool {
    objects::covers(&serde_json::json!(found), &serde_json::json!(wanted))
}
