//! Builders that read aloud: `story(deployment("m").replicas(3)).on(h200x8(2))`.
#![allow(dead_code)] // each test binary uses its own part

pub mod fleets;
pub mod schema;

use std::sync::Arc;

use engine_spec::{InspectReport, LoadReport, ModelConfig, ModelFacts};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use operator_api::ModelDeployment;
use operator_core::devices::{AllocationView, ClaimNews, SliceView, by_node};
use operator_core::snapshot::{
    Claim, ClaimTemplateView, Cluster, ConfigMapView, LoadSample, NodeView, PodPhase, PodSamples,
    PodView, Scheduled, Terminated,
};
use operator_core::{Action, Controller, Object, Plan, Settings, Snapshot, check, names, plan};
use serde_json::{Value, json};

pub fn now() -> Timestamp {
    "2026-11-24T12:00:00Z".parse().unwrap()
}

pub fn ago(seconds: i64) -> Timestamp {
    now()
        .checked_sub(SignedDuration::from_secs(seconds))
        .unwrap()
}

pub fn settings() -> Settings {
    Settings {
        engine_image: "registry.example/cachalot-engine:1".into(),
        image_pull_policy: "IfNotPresent".into(),
        node_cache: None,
        network_policies: true,
    }
}

/// The published config of DeepSeek-R1, as far as it differs from the family's defaults.
pub const R1_CONFIG: &str = r#"{"model_type":"deepseek_v3","max_position_embeddings":163840,"n_group":8,
    "num_nextn_predict_layers":1,"quantization_config":{"quant_method":"fp8","weight_block_size":[128,128]},
    "rope_scaling":{"beta_fast":32,"beta_slow":1,"factor":40,"mscale":1.0,"mscale_all_dim":1.0,
    "original_max_position_embeddings":4096,"type":"yarn"}}"#;

/// A model of some megabytes.
pub const SMALL_CONFIG: &str = r#"{"model_type":"deepseek_v3","vocab_size":512,"hidden_size":64,
    "intermediate_size":128,"moe_intermediate_size":32,"num_hidden_layers":4,"num_attention_heads":4,
    "num_key_value_heads":4,"q_lora_rank":32,"kv_lora_rank":32,"qk_nope_head_dim":16,"qk_rope_head_dim":16,
    "v_head_dim":16,"n_routed_experts":8,"n_shared_experts":1,"num_experts_per_tok":2,"n_group":2,
    "topk_group":1,"first_k_dense_replace":1,"max_position_embeddings":1024,"torch_dtype":"float32",
    "rope_theta":10000.0}"#;

pub fn facts_of(config: &str) -> ModelFacts {
    let config = ModelConfig::from_hf_json(config).expect("a config");
    ModelFacts::from_config(config, format!("sha256:{}", "a".repeat(64)))
}

pub fn small_report() -> String {
    InspectReport::Facts(Box::new(facts_of(SMALL_CONFIG))).to_message()
}

/// A deployment on the CPU, changed by JSON merged into it.
pub fn deployment(name: &str, spec: Value) -> ModelDeployment {
    let mut object = json!({
        "apiVersion": "cachalot.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": name, "namespace": "default", "uid": "mdep-uid", "generation": 1},
        "spec": {
            "model": {"source": "file:///models/small"},
            "accelerator": {"type": "cpu"},
            "context": {"maxTokens": 512, "maxConcurrentSequences": 4},
            "replicas": 1,
        },
    });
    merge(&mut object["spec"], spec);
    serde_json::from_value(object).expect("a ModelDeployment")
}

/// The same on GPUs, with R1's config given.
pub fn r1(spec: Value) -> ModelDeployment {
    let mut whole = json!({
        "model": {"source": "hf://deepseek-ai/DeepSeek-R1", "configMapRef": {"name": "r1-config"}},
        "accelerator": {"type": "nvidia"},
        "context": {"maxTokens": 16384, "maxConcurrentSequences": 16},
    });
    merge(&mut whole, spec);
    deployment("r1", whole)
}

/// Null removes a field, as in a JSON merge patch.
pub fn merge(target: &mut Value, patch: Value) {
    match (target, patch) {
        (Value::Object(target), Value::Object(patch)) => {
            for (key, value) in patch {
                if value.is_null() {
                    target.remove(&key);
                } else {
                    merge(target.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (target, patch) => *target = patch,
    }
}

pub fn node(name: &str, cpu: &str, memory: &str) -> Node {
    serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {
            "allocatable": {"cpu": cpu, "memory": memory, "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-24T00:00:00Z"}],
        },
    }))
    .expect("a node")
}

pub fn gpu_node(name: &str, product: &str, memory_mib: u64, gpus: u64) -> Node {
    let mut node = serde_json::to_value(node(name, "128", "1024Gi")).unwrap();
    merge(
        &mut node,
        json!({
            "metadata": {"labels": {
                "nvidia.com/gpu.product": product,
                "nvidia.com/gpu.memory": memory_mib.to_string(),
                "nvidia.com/gpu.count": gpus.to_string(),
                "nvidia.com/gpu.compute.major": "9",
            }},
            "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]},
            "status": {"allocatable": {"nvidia.com/gpu": gpus.to_string()}},
        }),
    );
    serde_json::from_value(node).unwrap()
}

/// A node whose GPUs are all divided alike: MIG strategy `single`.
pub fn mig_single(name: &str, profile: &str, memory_mib: u64, count: u64) -> Node {
    let product = format!("NVIDIA-H200-MIG-{profile}");
    let labels = json!({"metadata": {"labels": {
        "nvidia.com/mig.capable": "true",
        "nvidia.com/mig.strategy": "single",
        "nvidia.com/mig.config.state": "success",
    }}});
    with(gpu_node(name, &product, memory_mib, count), labels)
}

/// A node with whole GPUs and, counted apart, MIG devices: strategy `mixed`.
pub fn mig_mixed(name: &str, gpus: u64, devices: &[(&str, u64, u64)]) -> Node {
    let mut node = with(
        gpu_node(name, "NVIDIA-H200", 143_771, gpus),
        json!({"metadata": {"labels": {"nvidia.com/mig.strategy": "mixed"}}}),
    );
    for (profile, memory_mib, count) in devices {
        let resource = format!("nvidia.com/mig-{profile}");
        let about = |what: &str| format!("{resource}.{what}");
        let labels = json!({
            about("memory"): memory_mib.to_string(),
            about("count"): count.to_string(),
            about("product"): format!("NVIDIA-H200-MIG-{profile}"),
        });
        let allocatable = json!({resource.clone(): count.to_string()});
        node = with(
            node,
            json!({"metadata": {"labels": labels}, "status": {"allocatable": allocatable}}),
        );
    }
    node
}

/// What NVIDIA's DRA driver publishes of a node's GPUs.
pub fn slice(node: &str, product: &str, memory: &str, gpus: u64) -> ResourceSlice {
    let devices: Vec<Value> = (0..gpus)
        .map(|index| {
            json!({
                "name": format!("gpu-{index}"),
                "attributes": {
                    "type": {"string": "gpu"},
                    "uuid": {"string": format!("GPU-{node}-{index}")},
                    "productName": {"string": product},
                    "cudaComputeCapability": {"version": "9.0.0"},
                },
                "capacity": {"memory": {"value": memory}},
            })
        })
        .collect();
    serde_json::from_value(json!({
        "metadata": {"name": format!("{node}-gpu")},
        "spec": {
            "driver": "gpu.nvidia.com",
            "nodeName": node,
            "pool": {"name": node, "generation": 1, "resourceSliceCount": 1},
            "devices": devices,
        },
    }))
    .unwrap()
}

/// A claim of someone else that holds devices.
pub fn held(pool: &str, devices: &[&str]) -> ResourceClaim {
    let results: Vec<Value> = devices
        .iter()
        .map(|device| {
            json!({"request": "r", "driver": "gpu.nvidia.com", "pool": pool, "device": device})
        })
        .collect();
    serde_json::from_value(json!({
        "metadata": {"name": "held", "namespace": "other"},
        "spec": {},
        "status": {"allocation": {"devices": {"results": results}}},
    }))
    .unwrap()
}

pub fn h200x8(name: &str) -> Node {
    gpu_node(name, "NVIDIA-H200", 143_771, 8)
}

pub fn h100x8(name: &str) -> Node {
    gpu_node(name, "NVIDIA-H100-80GB-HBM3", 81_559, 8)
}

/// Changes an object by JSON merged into it.
pub fn with<T: serde::Serialize + serde::de::DeserializeOwned>(object: T, patch: Value) -> T {
    let mut value = serde_json::to_value(object).unwrap();
    merge(&mut value, patch);
    serde_json::from_value(value).unwrap()
}

/// A snapshot in the making.
#[derive(Clone)]
pub struct Story {
    pub snapshot: Snapshot,
    pub settings: Settings,
    nodes: Vec<Node>,
    claims: Vec<Claim>,
    slices: Vec<SliceView>,
    others: Vec<AllocationView>,
}

pub fn story(deployment: ModelDeployment) -> Story {
    let source_is_given = deployment.spec.model.config_map_ref.is_some();
    let mut story = Story {
        snapshot: Snapshot {
            now: now(),
            deployment: Arc::new(deployment),
            pods: Vec::new(),
            config_maps: Vec::new(),
            claim_templates: Vec::new(),
            model_config: None,
            service: None,
            ranks_service: None,
            ranks_policy: None,
            disruption_budget: None,
            quotas: Vec::new(),
            contest: Default::default(),
            cluster: Arc::new(Cluster::default()),
            samples: Default::default(),
            demand: None,
            gpu_faults: Vec::new(),
            refusal: None,
        },
        settings: settings(),
        nodes: Vec::new(),
        claims: Vec::new(),
        slices: Vec::new(),
        others: Vec::new(),
    };
    if source_is_given {
        story = story.of_config(R1_CONFIG);
    }
    story
}

impl Story {
    pub fn on(mut self, nodes: impl IntoIterator<Item = Node>) -> Self {
        self.nodes.extend(nodes);
        self.recount();
        self
    }

    /// A node in place of the one of its name.
    pub fn renewed(mut self, node: Node) -> Self {
        self.nodes
            .retain(|old| old.metadata.name != node.metadata.name);
        self.on([node])
    }

    /// Slices that are published, and claims of others that hold some of them.
    pub fn publishing(
        mut self,
        slices: impl IntoIterator<Item = ResourceSlice>,
        claims: impl IntoIterator<Item = ResourceClaim>,
    ) -> Self {
        self.slices
            .extend(slices.into_iter().filter_map(|slice| SliceView::of(&slice)));
        self.others.extend(
            claims
                .into_iter()
                .filter_map(|claim| AllocationView::of(&claim)),
        );
        Arc::make_mut(&mut self.snapshot.cluster).claims = ClaimNews::Known;
        self.recount();
        self
    }

    fn recount(&mut self) {
        let devices = by_node(&self.slices, &self.others);
        let nodes = self.nodes.iter().map(|node| {
            let view = NodeView::of(node);
            let published = devices.get(&view.name);
            Arc::new(view.with_devices(published))
        });
        let held = devices.iter().map(|(node, devices)| devices.claim(node));
        let claims: Vec<Claim> = self.claims.iter().cloned().chain(held).collect();
        let news = self.snapshot.cluster.claims.clone();
        self.snapshot.cluster = Arc::new(Cluster {
            claims: news,
            ..Cluster::new(nodes, &claims)
        });
    }

    /// The model's facts are known from an earlier inspection.
    pub fn inspected(mut self) -> Self {
        let valid = operator_core::validate(&self.snapshot.deployment).expect("valid");
        let hash = operator_core::inspect::source_hash(&valid);
        self.snapshot.config_maps.push(Arc::new(ConfigMapView {
            name: names::facts_config_map(&valid.name, &hash),
            uid: "facts-uid".into(),
            controller: Controller::with_uid(&valid.uid),
            data: [(
                names::FACTS_JSON.to_owned(),
                serde_json::to_string(&facts_of(SMALL_CONFIG)).unwrap(),
            )]
            .into(),
        }));
        self
    }

    /// The config map that the user gives holds this config.
    pub fn of_config(mut self, text: &str) -> Self {
        self.snapshot.model_config = Some(Arc::new(ConfigMapView {
            name: "r1-config".into(),
            uid: "cm".into(),
            controller: Controller::default(),
            data: [("config.json".to_owned(), text.to_owned())].into(),
        }));
        self
    }

    /// A pod of someone else that holds a resource.
    pub fn holds(mut self, node: &str, resource: &str, count: u64) -> Self {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "other"},
            "spec": {"nodeName": node, "containers": [
                {"name": "one", "resources": {"limits": {resource: count.to_string()}}}]},
        }))
        .unwrap();
        self.claims.extend(Claim::of(&pod));
        self.recount();
        self
    }

    /// A pod of someone else.
    pub fn taken(mut self, node: &str, gpus: u64) -> Self {
        self.claims.push(Claim {
            node: node.into(),
            requests: operator_core::Resources {
                gpus,
                cpu_millis: 1000,
                memory_bytes: 1 << 30,
                pods: 1,
                ..operator_core::Resources::default()
            },
        });
        self.recount();
        self
    }

    pub fn plan(&self) -> Plan {
        let plan = plan(&self.snapshot, &self.settings);
        assert_eq!(
            check(&plan, &self.snapshot, &self.settings),
            vec![],
            "{plan}"
        );
        // One that broke a rule was replaced by one that does nothing, and that looks like caution.
        let mut conditions = plan.status.conditions.iter();
        let rejected = conditions.find(|condition| condition.reason == "PlanRejected");
        assert_eq!(rejected, None);
        plan.actions.iter().for_each(assert_in_order);
        plan
    }

    /// Carries the plan out as a perfect cluster would: pods are bound to their first choice and
    /// in the state that `shape` gives them.
    pub fn after(&self, plan: &Plan, shape: impl Fn(&mut PodView)) -> Self {
        let mut next = self.clone();
        for action in &plan.actions {
            next.apply(action, &shape);
        }
        let mut deployment = (*next.snapshot.deployment).clone();
        deployment.status = Some(plan.status.clone());
        next.snapshot.deployment = Arc::new(deployment);
        next.recount();
        next
    }

    fn apply(&mut self, action: &Action, shape: &impl Fn(&mut PodView)) {
        match action {
            Action::Create(Object::Pod(pod)) => {
                let mut pod: Pod = (**pod).clone();
                let name = pod.metadata.name.clone().unwrap();
                pod.metadata.uid = Some(format!("uid-{name}"));
                pod.metadata.creation_timestamp = Some(Time(self.snapshot.now));
                if let Some(node) = operator_core::objects::preferred_nodes(&pod).first() {
                    pod.spec.as_mut().unwrap().node_name = Some(node.clone());
                }
                let mut view = PodView::of(&pod);
                shape(&mut view);
                // A pod that has ended takes nothing.
                self.claims
                    .extend(Claim::of(&pod).filter(|_| !view.is_finished()));
                self.snapshot.pods.push(Arc::new(view));
            }
            Action::Create(_) => panic!("only pods are created"),
            Action::Apply(Object::ConfigMap(map)) => {
                let mut view = ConfigMapView::of(map);
                view.uid = format!("uid-{}", view.name);
                self.snapshot
                    .config_maps
                    .retain(|old| old.name != view.name);
                self.snapshot.config_maps.push(Arc::new(view));
            }
            Action::Apply(Object::ResourceClaimTemplate(template)) => {
                let mut view = ClaimTemplateView::of(template);
                view.uid = format!("uid-{}", view.name);
                self.snapshot.claim_templates.push(Arc::new(view));
            }
            Action::Apply(Object::Service(service)) => {
                let is_front = service.metadata.name == self.snapshot.deployment.metadata.name;
                let mut service = (**service).clone();
                service.metadata.uid = Some("uid-of-service".into());
                let service = Some(Arc::new(service));
                if is_front {
                    self.snapshot.service = service;
                } else {
                    self.snapshot.ranks_service = service;
                }
            }
            Action::Apply(Object::NetworkPolicy(policy)) => {
                let mut policy = (**policy).clone();
                policy.metadata.uid = Some("uid-of-policy".into());
                self.snapshot.ranks_policy = Some(Arc::new(policy));
            }
            Action::Apply(Object::PodDisruptionBudget(budget)) => {
                self.snapshot.disruption_budget = Some(Arc::new((**budget).clone()));
            }
            Action::Apply(Object::Pod(_)) => panic!("pods are created"),
            Action::Adopt {
                kind, name, owner, ..
            } => {
                let controller = Controller::with_uid(&owner.uid);
                match kind {
                    operator_core::Kind::Pod => self.pod(name, |pod| pod.controller = controller),
                    operator_core::Kind::ConfigMap => {
                        let mut maps = self.snapshot.config_maps.iter_mut();
                        let map = maps.find(|map| map.name == *name).unwrap();
                        Arc::make_mut(map).controller = controller;
                    }
                    _ => {
                        let mut templates = self.snapshot.claim_templates.iter_mut();
                        let template = templates.find(|one| one.name == *name).unwrap();
                        Arc::make_mut(template).controller = controller;
                    }
                }
            }
            Action::Release { name, .. } => {
                self.pod(name, |pod| pod.annotations.remove(names::PREEMPTS));
            }
            Action::PatchPod {
                name,
                labels,
                annotations,
                ..
            } => self.pod(name, |pod| {
                for (key, value) in labels {
                    pod.labels.insert(key, value.clone());
                }
                for (key, value) in annotations {
                    match value {
                        Some(value) => pod.annotations.insert(key, value.clone()),
                        None => pod.annotations.remove(key),
                    };
                }
            }),
            Action::Delete { kind, name, .. } => match kind {
                operator_core::Kind::Pod => self.pod(name, |pod| pod.deleting = true),
                operator_core::Kind::ResourceClaimTemplate => {
                    self.snapshot
                        .claim_templates
                        .retain(|one| one.name != *name);
                }
                operator_core::Kind::Service => self.snapshot.ranks_service = None,
                operator_core::Kind::NetworkPolicy => self.snapshot.ranks_policy = None,
                _ => self.snapshot.config_maps.retain(|map| map.name != *name),
            },
        }
    }

    /// Changes one pod.
    pub fn pod(&mut self, name: &str, change: impl FnOnce(&mut PodView)) {
        let pod = self
            .snapshot
            .pods
            .iter_mut()
            .find(|pod| pod.name == name)
            .unwrap_or_else(|| panic!("no pod {name}"));
        change(Arc::make_mut(pod));
    }

    /// Changes the engine pod of a replica index.
    pub fn replica(mut self, index: u32, change: impl FnOnce(&mut PodView)) -> Self {
        let name = self.name_of(index);
        self.pod(&name, change);
        self
    }

    pub fn name_of(&self, index: u32) -> String {
        let index = index.to_string();
        let mut pods = self.snapshot.pods.iter();
        pods.find(|pod| pod.label(names::REPLICA) == index)
            .unwrap_or_else(|| panic!("no replica {index}"))
            .name
            .clone()
    }

    /// Pods that are being deleted are gone.
    pub fn swept(mut self) -> Self {
        self.snapshot.pods.retain(|pod| !pod.deleting);
        self
    }

    pub fn later(mut self, seconds: i64) -> Self {
        let step = SignedDuration::from_secs(seconds);
        self.snapshot.now = self.snapshot.now.checked_add(step).unwrap();
        self
    }

    /// The user changes the spec.
    pub fn edited(mut self, spec: Value) -> Self {
        let generation = self.snapshot.deployment.metadata.generation.unwrap_or(0) + 1;
        let deployment = with(
            (*self.snapshot.deployment).clone(),
            json!({"spec": spec, "metadata": {"generation": generation}}),
        );
        self.snapshot.deployment = Arc::new(deployment);
        self
    }

    /// What a replica says about its load, now.
    pub fn load(mut self, index: u32, report: LoadReport) -> Self {
        let name = self.name_of(index);
        let at = self.snapshot.now;
        let samples: &mut PodSamples = self.snapshot.samples.entry(name).or_default();
        samples.take_load(LoadSample { at, report });
        self
    }

    /// A running fleet: plans are carried out, every pod answers, until nothing is left to do.
    pub fn running(mut self) -> Self {
        for _ in 0..20 {
            let plan = self.plan();
            if plan.actions.is_empty() {
                return self.after(&plan, |_| ());
            }
            self = self.after(&plan, answers).swept().later(1);
            for pod in self.snapshot.pods.clone() {
                self.pod(&pod.name, answers);
            }
        }
        panic!("it never settles: {}", self.plan());
    }
}

/// The pod answers.
pub fn answers(pod: &mut PodView) {
    if pod.label(names::COMPONENT) == names::INSPECT {
        pod.phase = PodPhase::Succeeded;
        pod.container.terminated = Some(Box::new(Terminated {
            message: small_report(),
            ..Terminated::default()
        }));
        return;
    }
    pod.phase = PodPhase::Running;
    pod.ready = true;
    pod.scheduled = Scheduled::Bound;
}

/// The pod is starting.
pub fn starts(pod: &mut PodView) {
    pod.phase = PodPhase::Running;
    pod.scheduled = Scheduled::Bound;
}

/// The pod ended for good at `at`.
pub fn fails(pod: &mut PodView, at: Timestamp) {
    pod.phase = PodPhase::Failed;
    pod.reason = "Evicted".into();
    pod.ready = false;
    pod.container.terminated = Some(Box::new(Terminated {
        exit_code: 137,
        reason: "Error".into(),
        message: "low on memory".into(),
        finished: Some(at),
    }));
}

/// Actions as text, one a line.
pub fn actions(plan: &Plan) -> Vec<String> {
    plan.actions.iter().map(ToString::to_string).collect()
}

/// Actions on engine pods as text, with revisions left out.
pub fn pod_actions(plan: &Plan) -> Vec<String> {
    let verbs = ["create Pod", "delete Pod", "patch Pod"];
    actions(plan)
        .into_iter()
        .filter(|action| verbs.iter().any(|verb| action.starts_with(verb)))
        .map(|action| {
            let words: Vec<String> = action
                .split(' ')
                .map(|word| {
                    let parts: Vec<&str> = word.split('-').collect();
                    match parts.as_slice() {
                        [name, index, revision, attempt] if revision.len() == 8 => {
                            format!("{name}-{index}-{attempt}")
                        }
                        _ => word.to_owned(),
                    }
                })
                .filter(|word| !word.starts_with("cachalot.dev/drain-since"))
                .collect();
            words.join(" ")
        })
        .collect()
}

/// Status, reason and message of a condition.
pub fn condition(plan: &Plan, kind: &str) -> (String, String, String) {
    let condition = plan.status.conditions.iter().find(|c| c.type_ == kind);
    let condition = condition.unwrap_or_else(|| panic!("no condition {kind}"));
    (
        condition.status.clone(),
        condition.reason.clone(),
        condition.message.clone(),
    )
}

/// Revisions are hashes of pods and claims as they are spelled, so the order of their fields must be that of their names whatever
/// they are made of: one that moved would have another operator replace every pod.
fn assert_in_order(action: &Action) {
    let (Action::Create(object) | Action::Apply(object)) = action else {
        return;
    };
    let (spelled, value) = match object {
        Object::Pod(pod) => (serde_json::to_string(&pod.spec), json!(pod.spec)),
        Object::ResourceClaimTemplate(template) => {
            (serde_json::to_string(&template.spec), json!(template.spec))
        }
        _ => return,
    };
    assert_eq!(spelled.unwrap(), names::canonical(value));
}
