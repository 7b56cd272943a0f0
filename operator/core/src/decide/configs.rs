//! What the pods of each revision are configured by: config maps and templates of claims, written before the pods and
//! removed after the last that uses them.

use operator_api::RolloutStatus;

use super::Decided;
use crate::fit::Layout;
use crate::inspect::source_hash;
use crate::names::{self, Revision};
use crate::objects;
use crate::plan::{Action, Kind, Object};

impl Decided<'_> {
    /// The configuration of a revision, where it is missing or was changed. Its record needs no look:
    /// it is believed only where it makes the revision.
    pub(super) fn engine_config(
        &self,
        layout: &Layout,
        revision: &Revision,
        record: impl FnOnce() -> String,
    ) -> Option<Action> {
        let name = names::engine_config_map(&self.valid.name, revision);
        let engine = objects::engine_json(layout);
        let is_there = self.snapshot.config_maps.iter().any(|map| {
            map.name == name
                && map.data.get(names::ENGINE_JSON) == Some(engine.as_str())
                && map.data.get(names::REVISION_JSON).is_some()
        });
        (!is_there).then(|| {
            let wanted = objects::engine_config_map(self.valid, engine, revision, record());
            Action::Apply(Object::ConfigMap(Box::new(wanted)))
        })
    }

    /// The template of the claims of a revision's pods, where it is missing. Kubernetes lets nobody
    /// change one, so there is nothing to compare.
    pub(super) fn claim_template(&self, layout: &Layout, revision: &Revision) -> Option<Action> {
        let wanted = objects::claim_template(self.valid, layout, revision)?;
        let mut there = self.snapshot.claim_templates.iter();
        let is_there = there.any(|template| Some(&template.name) == wanted.metadata.name.as_ref());
        (!is_there).then(|| Action::Apply(Object::ResourceClaimTemplate(Box::new(wanted))))
    }

    /// Configurations and claim templates of revisions that no pod uses any more.
    pub(super) fn old_configs(&self, memory: &RolloutStatus) -> Vec<Action> {
        let needed = [&memory.target_revision, &memory.stable_revision];
        let prefix = format!("{}-", self.valid.name);
        let kept = names::facts_config_map(&self.valid.name, &source_hash(self.valid));
        let is_unused = |revision: &str| {
            revision.len() == 8
                && needed
                    .iter()
                    .all(|needed| needed.as_deref() != Some(revision))
                && self
                    .replicas
                    .iter()
                    .all(|replica| replica.revision() != revision)
        };
        let maps = self.snapshot.config_maps.iter();
        let maps = maps
            .filter(|map| map.name != kept)
            .map(|map| (Kind::ConfigMap, &map.name, &map.uid));
        let templates = self.snapshot.claim_templates.iter();
        let templates = templates.map(|one| (Kind::ResourceClaimTemplate, &one.name, &one.uid));
        maps.chain(templates)
            .filter(|(_, name, _)| name.strip_prefix(&prefix).is_some_and(is_unused))
            .map(|(kind, name, uid)| Action::Delete {
                kind,
                name: name.clone(),
                uid: uid.clone(),
                if_silent: None,
            })
            .collect()
    }
}
