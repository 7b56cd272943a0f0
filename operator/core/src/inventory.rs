//! A cluster as lists of Kubernetes objects, and the snapshot of one wish in it.
//!
//! The running operator keeps mirrors and never builds this; it is for whoever looks once: the
//! kubectl plugin, with lists from a live cluster or from files that `kubectl get -o json` wrote,
//! and tests. What a pod or a node means is decided by the same projections as in the operator.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine_spec::ModelFacts;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, ResourceQuota, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceClaimTemplate, ResourceSlice};
use k8s_openapi::api::scheduling::v1::PriorityClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use operator_api::{GpuFaultStatus, ModelDeployment};

use crate::devices::{self, AllocationView, ClaimNews, NodeDevices, SliceView};
use crate::inspect::source_hash;
use crate::names;
use crate::objects;
use crate::ownership::Controller;
use crate::plan::Settings;
use crate::priority::{self, Contest, PriorityClassView, Rival};
use crate::snapshot::{
    Claim, ClaimTemplateView, Cluster, ConfigMapView, NodeView, PodView, QuotaView, Snapshot,
};
use crate::validate::validate;

/// Everything that was listed.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    /// Nodes.
    pub nodes: Vec<Node>,
    /// Pods of everyone.
    pub pods: Vec<Pod>,
    /// Config maps: ours, and those that specs name.
    pub config_maps: Vec<ConfigMap>,
    /// Services.
    pub services: Vec<Service>,
    /// Disruption budgets.
    pub budgets: Vec<PodDisruptionBudget>,
    /// Network policies.
    pub network_policies: Vec<NetworkPolicy>,
    /// Quotas.
    pub quotas: Vec<ResourceQuota>,
    /// What DRA drivers publish.
    pub slices: Vec<ResourceSlice>,
    /// Resource claims of everyone.
    pub claims: Vec<ResourceClaim>,
    /// Templates of resource claims.
    pub claim_templates: Vec<ResourceClaimTemplate>,
    /// Why slices and claims could not be listed; none when they were.
    pub claims_unread: Option<String>,
    /// Priority classes.
    pub priority_classes: Vec<PriorityClass>,
    /// Wishes.
    pub deployments: Vec<ModelDeployment>,
}

impl Inventory {
    /// Nodes, and what all pods take of them.
    pub fn cluster(&self) -> Cluster {
        let devices = self.devices();
        let mut claims: Vec<Claim> = self.pods.iter().filter_map(Claim::of).collect();
        claims.extend(devices.iter().map(|(node, devices)| devices.claim(node)));
        let nodes = self.nodes.iter().map(|node| {
            let view = NodeView::of(node);
            let published = devices.get(&view.name);
            Arc::new(view.with_devices(published))
        });
        let mut cluster = Cluster::new(nodes, &claims);
        cluster.claims = match &self.claims_unread {
            Some(why) => ClaimNews::Unread(why.clone()),
            None => ClaimNews::Known,
        };
        cluster
    }

    /// GPUs that claims may ask for, by node.
    pub fn devices(&self) -> BTreeMap<String, NodeDevices> {
        let slices: Vec<SliceView> = self.slices.iter().filter_map(SliceView::of).collect();
        let others = self.claims.iter().filter(|c| !AllocationView::is_ours(c));
        let others: Vec<AllocationView> = others.filter_map(AllocationView::of).collect();
        devices::by_node(&slices, &others)
    }

    /// The wish of that name.
    pub fn deployment(&self, namespace: &str, name: &str) -> Option<&ModelDeployment> {
        self.deployments
            .iter()
            .find(|deployment| is_named(&deployment.metadata, namespace, name))
    }

    /// The config map of that name.
    pub fn config_map(&self, namespace: &str, name: &str) -> Option<&ConfigMap> {
        self.config_maps
            .iter()
            .find(|map| is_named(&map.metadata, namespace, name))
    }

    /// Lays `given` over what is there, as an apply would: a spec that is given replaces the one
    /// of that name and keeps its uid and status.
    pub fn overlay(&mut self, given: Inventory) {
        let Inventory {
            nodes,
            pods,
            config_maps,
            services,
            budgets,
            network_policies,
            quotas,
            slices,
            claims,
            claim_templates,
            claims_unread,
            priority_classes,
            deployments,
        } = given;
        for mut deployment in deployments {
            let key = (&deployment.metadata.namespace, &deployment.metadata.name);
            let there = self
                .deployments
                .iter()
                .position(|old| (&old.metadata.namespace, &old.metadata.name) == key);
            if let Some(index) = there {
                let old = self.deployments.swap_remove(index);
                deployment.metadata.uid = old.metadata.uid;
                deployment.metadata.generation = old.metadata.generation;
                deployment.status = old.status;
            }
            self.deployments.push(deployment);
        }
        for map in config_maps {
            let key = (&map.metadata.namespace, &map.metadata.name);
            self.config_maps
                .retain(|old| (&old.metadata.namespace, &old.metadata.name) != key);
            self.config_maps.push(map);
        }
        self.nodes.extend(nodes);
        self.pods.extend(pods);
        self.services.extend(services);
        self.budgets.extend(budgets);
        self.network_policies.extend(network_policies);
        self.quotas.extend(quotas);
        self.slices.extend(slices);
        self.claims.extend(claims);
        self.claim_templates.extend(claim_templates);
        self.claims_unread = self.claims_unread.take().or(claims_unread);
        self.priority_classes.extend(priority_classes);
    }

    /// The operator's configuration as its youngest pods show it; none while it has made no pod.
    /// Pods with an image of their own (`podTemplate.image`) say nothing about it.
    pub fn settings(&self) -> Option<Settings> {
        let owner = |pod: &Pod| {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            let labels = pod.metadata.labels.as_ref()?;
            let owner = self.deployment(namespace, labels.get(names::MODEL_DEPLOYMENT)?)?;
            (owner.spec.pod_template.image.is_none()).then_some(owner)
        };
        let age = |pod: &&Pod| pod.metadata.creation_timestamp.clone();
        let pods = || self.pods.iter().filter(|pod| owner(pod).is_some());
        let youngest = pods().max_by_key(age)?;
        let container = youngest.spec.as_ref()?.containers.first()?;
        // Pods that fetch nothing say nothing about the cache.
        let fetches = |pod: &&Pod| {
            let labels = pod.metadata.labels.as_ref();
            let component = labels.and_then(|labels| labels.get(names::COMPONENT));
            let valid = owner(pod).and_then(|owner| validate(owner).ok());
            component.is_some_and(|component| component == names::ENGINE)
                && valid.is_some_and(|valid| valid.source.is_fetched())
        };
        // Where there are groups, what they have says whether they get one.
        let is_shared = |metadata: &ObjectMeta| {
            let labels = metadata.labels.as_ref();
            let name = metadata.name.as_deref().unwrap_or_default();
            names::owner_of_ranks(name).is_some()
                && labels.is_some_and(|labels| labels.contains_key(names::MODEL_DEPLOYMENT))
        };
        let has_groups = self.services.iter().any(|it| is_shared(&it.metadata));
        let policies = &self.network_policies;
        Some(Settings {
            network_policies: !has_groups || policies.iter().any(|it| is_shared(&it.metadata)),
            engine_image: container.image.clone()?,
            image_pull_policy: container.image_pull_policy.clone()?,
            node_cache: pods()
                .filter(fetches)
                .max_by_key(age)
                .and_then(objects::node_cache),
        })
    }

    /// Who else wants the nodes that `deployment` wants.
    fn contest(&self, deployment: &ModelDeployment) -> Contest {
        let ModelDeployment { metadata, spec, .. } = deployment;
        let own = (
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.name.as_deref().unwrap_or_default(),
        );
        let classes = self.priority_classes.iter();
        let pods = self.pods.iter().map(|pod| {
            Rival::of(
                pod.metadata.namespace.clone().unwrap_or_default().into(),
                Arc::new(PodView::of(pod)),
            )
        });
        Contest::of(
            own,
            spec.placement.priority_class_name.as_deref(),
            classes
                .map(|class| Arc::new(PriorityClassView::of(class)))
                .collect(),
            pods,
            |(namespace, name)| {
                let other = self.deployment(namespace, name);
                other.map_or(0, |other| priority::floor(&other.spec))
            },
        )
    }

    /// GPUs at fault that other wishes than this one remember.
    fn gpu_faults_but_of(&self, namespace: &str, name: &str) -> Vec<GpuFaultStatus> {
        let others = self.deployments.iter();
        others
            .filter(|other| !is_named(&other.metadata, namespace, name))
            .filter_map(|other| other.status.as_ref())
            .flat_map(|status| status.gpu_faults.iter().cloned())
            .collect()
    }

    /// What a decision about `deployment` at `now` depends on; `cluster` is [`Inventory::cluster`],
    /// made once for many wishes. There are no samples: nobody was asked for its load.
    pub fn snapshot(
        &self,
        deployment: ModelDeployment,
        cluster: Arc<Cluster>,
        now: Timestamp,
    ) -> Snapshot {
        let namespace = deployment.metadata.namespace.clone().unwrap_or_default();
        let name = deployment.metadata.name.clone().unwrap_or_default();
        let is_child = |metadata: &ObjectMeta| {
            let labels = metadata.labels.as_ref();
            metadata.namespace.as_deref() == Some(&namespace)
                && labels.and_then(|labels| labels.get(names::MODEL_DEPLOYMENT)) == Some(&name)
        };
        let wanted_config = deployment.spec.model.config_map_ref.as_ref();
        let model_config = wanted_config.and_then(|reference| {
            let mut maps = self.config_maps.iter();
            maps.find(|map| is_named(&map.metadata, &namespace, &reference.name))
        });
        Snapshot {
            now,
            contest: self.contest(&deployment),
            pods: self
                .pods
                .iter()
                .filter(|pod| is_child(&pod.metadata))
                .map(|pod| Arc::new(PodView::of(pod)))
                .collect(),
            config_maps: self
                .config_maps
                .iter()
                .filter(|map| is_child(&map.metadata))
                .map(|map| Arc::new(ConfigMapView::of(map)))
                .collect(),
            claim_templates: self
                .claim_templates
                .iter()
                .filter(|template| is_child(&template.metadata))
                .map(|template| Arc::new(ClaimTemplateView::of(template)))
                .collect(),
            model_config: model_config.map(|map| Arc::new(ConfigMapView::of(map))),
            service: self
                .services
                .iter()
                .find(|service| is_named(&service.metadata, &namespace, &name))
                .map(|service| Arc::new(service.clone())),
            ranks_service: self
                .services
                .iter()
                .find(|service| is_named(&service.metadata, &namespace, &names::ranks(&name)))
                .map(|service| Arc::new(service.clone())),
            ranks_policy: self
                .network_policies
                .iter()
                .find(|policy| is_named(&policy.metadata, &namespace, &names::ranks(&name)))
                .map(|policy| Arc::new(policy.clone())),
            disruption_budget: self
                .budgets
                .iter()
                .find(|budget| is_named(&budget.metadata, &namespace, &name))
                .map(|budget| Arc::new(budget.clone())),
            quotas: self
                .quotas
                .iter()
                .filter(|quota| quota.metadata.namespace.as_deref() == Some(&namespace))
                .filter_map(QuotaView::of)
                .map(Arc::new)
                .collect(),
            gpu_faults: self.gpu_faults_but_of(&namespace, &name),
            deployment: Arc::new(deployment),
            cluster,
            samples: Default::default(),
            demand: None,
            refusal: None,
        }
    }
}

impl Snapshot {
    /// Supposes that an inspection found these facts, so that a plan can be made before one ran.
    /// Without effect on a spec that is not valid, or that names a config map for its facts.
    pub fn suppose_facts(&mut self, facts: &ModelFacts) {
        let Ok(valid) = validate(&self.deployment) else {
            return;
        };
        let name = names::facts_config_map(&valid.name, &source_hash(&valid));
        // ModelFacts is plain data with string keys: writing it cannot fail.
        let text = serde_json::to_string(facts).unwrap_or_default();
        self.config_maps.retain(|map| map.name != name);
        self.config_maps.push(Arc::new(ConfigMapView {
            name,
            uid: String::new(),
            controller: Controller::with_uid(
                self.deployment.metadata.uid.as_deref().unwrap_or_default(),
            ),
            data: [(names::FACTS_JSON, text.as_str())].into(),
        }));
    }
}

fn is_named(metadata: &ObjectMeta, namespace: &str, name: &str) -> bool {
    metadata.namespace.as_deref() == Some(namespace) && metadata.name.as_deref() == Some(name)
}
