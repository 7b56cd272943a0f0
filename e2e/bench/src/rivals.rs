//! Other projects' controllers: what an object and a command line of each looks like, and how it says that it is ready.
//!
//! Their binaries, custom resource definitions and versions are given, since nothing of theirs is here. Ours is one of
//! them, so that all are measured by the same code.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::future::try_join_all;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::cluster::Place;
use crate::objects::{self, NAMESPACE, clear_pods, count, wait_for};
use crate::operator::{self, Ended, Operator};
use crate::planning::{self, Shape};

/// How long a controller has to start, take its lease and fill its caches, before the clock runs.
const WARM_UP: Duration = Duration::from_secs(8);
/// How often it is looked whether all is removed.
const LOOK: Duration = Duration::from_millis(500);
/// Limits of those that limit their calls, raised to what the lab's own controllers have.
const RAISED: [&str; 2] = ["--kube-api-qps=1000", "--kube-api-burst=2000"];
const AIBRIX: &str = "orchestration.aibrix.ai";
const DEFAULTS: &str = "at its defaults";

/// Whose controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Project {
    /// This one: ModelDeployments.
    Cachalot,
    /// KubeAI: Models with replicas.
    KubeAi,
    /// Kthena: ModelServings with serving groups.
    Kthena,
    /// AIBrix: StormServices with role sets.
    AiBrix,
}

/// Something given for one project, as `NAME=VALUE`.
#[derive(Clone, Debug)]
pub struct Given {
    project: Project,
    value: String,
}

impl FromStr for Given {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text
            .split_once('=')
            .filter(|(_, value)| !value.is_empty())
            .ok_or_else(|| format!("\"{text}\" is not NAME=VALUE"))?;
        let project = match name {
            "kubeai" => Project::KubeAi,
            "kthena" => Project::Kthena,
            "aibrix" => Project::AiBrix,
            other => return Err(format!("\"{other}\" is not one of kubeai, kthena, aibrix")),
        };
        Ok(Self {
            project,
            value: value.to_owned(),
        })
    }
}

/// A controller to hold ours against.
#[derive(Clone, Debug)]
pub struct Rival {
    project: Project,
    binary: PathBuf,
    crds: PathBuf,
    version: String,
}

/// Joins what was given for each project.
///
/// # Errors
/// A binary is given without its definitions or its version, or the other way round.
pub fn rivals(binaries: &[Given], crds: &[Given], versions: &[Given]) -> Result<Vec<Rival>> {
    let find = |all: &[Given], project| {
        let found = all.iter().find(|given| given.project == project);
        found.map(|given| given.value.clone())
    };
    for other in crds.iter().chain(versions) {
        if find(binaries, other.project).is_none() {
            bail!(
                "--rival-crds, --rival-version: there is no --rival for {}",
                other.project.name()
            );
        }
    }
    let join = |given: &Given| {
        let project = given.project;
        let name = project.name();
        Ok(Rival {
            project,
            binary: PathBuf::from(&given.value),
            crds: find(crds, project)
                .with_context(|| {
                    format!("--rival {name}: give --rival-crds {name}=FILE_OR_FOLDER too")
                })?
                .into(),
            version: find(versions, project)
                .with_context(|| format!("--rival {name}: give --rival-version {name}=TEXT too"))?,
        })
    };
    binaries.iter().map(join).collect()
}

impl Project {
    fn name(self) -> &'static str {
        match self {
            Self::Cachalot => "cachalot",
            Self::KubeAi => "kubeai",
            Self::Kthena => "kthena",
            Self::AiBrix => "aibrix",
        }
    }

    /// Command lines to measure, the best last: what is said of each, and its flags.
    fn tunings(self) -> Vec<(&'static str, Vec<&'static str>)> {
        match self {
            // Neither limits its calls, so there is nothing to raise.
            Self::Cachalot | Self::KubeAi => vec![(DEFAULTS, Vec::new())],
            Self::Kthena => {
                let defaults = vec!["--controllers=modelserving", "--enable-webhook=false"];
                let mut tuned = defaults.clone();
                tuned.extend(RAISED);
                tuned.push("--workers=16");
                vec![(DEFAULTS, defaults), ("with raised limits", tuned)]
            }
            Self::AiBrix => {
                let defaults = vec![
                    "--controllers=stormservice-controller",
                    "--disable-webhook",
                    "--metrics-bind-address=0",
                    "--health-probe-bind-address=0",
                ];
                let mut tuned = defaults.clone();
                tuned.extend(RAISED);
                let words = "with raised limits, one worker (no flag for more)";
                vec![(DEFAULTS, defaults), (words, tuned)]
            }
        }
    }

    /// The kind of its object.
    pub fn resource(self) -> ApiResource {
        match self {
            Self::Cachalot => resource(
                "cachalot.dev",
                "v1alpha1",
                "ModelDeployment",
                "modeldeployments",
            ),
            Self::KubeAi => resource("kubeai.org", "v1", "Model", "models"),
            Self::Kthena => {
                let group = "workload.serving.volcano.sh";
                resource(group, "v1alpha1", "ModelServing", "modelservings")
            }
            Self::AiBrix => resource(AIBRIX, "v1alpha1", "StormService", "stormservices"),
        }
    }

    /// What it makes besides pods, which the garbage collector removes after them.
    fn dependents(self) -> Vec<ApiResource> {
        match self {
            Self::AiBrix => vec![resource(AIBRIX, "v1alpha1", "RoleSet", "rolesets")],
            Self::Cachalot | Self::KubeAi | Self::Kthena => Vec::new(),
        }
    }

    /// The object that asks for so many replicas of one GPU.
    pub fn object(self, name: &str, replicas: u32) -> Result<DynamicObject> {
        let pod = json!({
            "schedulerName": "default-scheduler",
            "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}],
            "containers": [{"name": "engine", "image": "localhost/engine:dev", "resources": {
                "requests": {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "1"},
                "limits": {"nvidia.com/gpu": "1"}}}],
        });
        let spec = match self {
            Self::Cachalot => {
                let mut spec = planning::wish(name, replicas, Shape::Small)?.spec;
                // No engine answers on a simulated node; the others do not ask theirs.
                spec.rollout.drain_timeout_seconds = Some(1);
                serde_json::to_value(spec)?
            }
            Self::KubeAi => json!({
                "url": "hf://cachalot/bench", "features": ["TextGeneration"], "engine": "VLLM",
                "resourceProfile": "bench:1", "autoscalingDisabled": true, "minReplicas": 0, "replicas": replicas,
            }),
            Self::Kthena => json!({
                "schedulerName": "default-scheduler", "replicas": replicas,
                "template": {"roles": [{
                    "name": "serve", "replicas": 1, "workerReplicas": 0, "entryTemplate": {"spec": pod}}]},
            }),
            Self::AiBrix => json!({
                "replicas": replicas, "stateful": false,
                "selector": {"matchLabels": {"app": name}},
                "template": {"metadata": {"labels": {"app": name}}, "spec": {"roles": [{
                    "name": "serve", "replicas": 1, "stateful": false,
                    "template": {"metadata": {"labels": {"app": name}}, "spec": pod}}]}},
            }),
        };
        let object = DynamicObject::new(name, &self.resource()).within(NAMESPACE);
        Ok(object.data(json!({"spec": spec})))
    }

    /// Whether the object's status says that it has so many replicas, all ready.
    pub fn is_at(self, object: &DynamicObject, replicas: u32) -> bool {
        let status = &object.data["status"];
        let is = |path: &str| {
            status.pointer(path).and_then(Value::as_u64).unwrap_or(0) == u64::from(replicas)
        };
        let is_seen = || status["observedGeneration"].as_i64() == object.metadata.generation;
        match self {
            Self::Cachalot => {
                is_seen() && is("/replicas") && is("/readyReplicas") && is("/updatedReplicas")
            }
            // It does not say which generation it has seen.
            Self::KubeAi => is("/replicas/all") && is("/replicas/ready"),
            Self::Kthena => is_seen() && is("/replicas") && is("/availableReplicas"),
            Self::AiBrix => is_seen() && is("/replicas") && is("/readyReplicas"),
        }
    }

    /// Objects that the controller needs to be there.
    fn needs(self) -> Vec<Value> {
        let named = |kind: &str, name: &str| json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}});
        match self {
            Self::KubeAi => vec![
                named("ServiceAccount", "kubeai-models"),
                named("ConfigMap", "kubeai-autoscaler-state"),
            ],
            Self::Cachalot | Self::Kthena | Self::AiBrix => Vec::new(),
        }
    }

    /// Its configuration file, where it has one.
    fn config(self) -> Option<Value> {
        let images = json!({"images": {"default": "localhost/engine:dev"}});
        (self == Self::KubeAi).then(|| json!({
            "secretNames": {"alibaba": "s", "aws": "s", "gcp": "s", "huggingface": "s"},
            "modelServers": {"OLlama": images, "VLLM": images, "FasterWhisper": images, "Infinity": images},
            "modelLoading": {"image": "localhost/loader:dev"},
            "modelRollouts": {"surge": 1},
            "modelServerPods": {"serviceAccountName": "kubeai-models"},
            "modelAutoscaling": {"stateConfigMapName": "kubeai-autoscaler-state"},
            "messaging": {"streams": []},
            "healthAddress": "127.0.0.1:0",
            "allowPodAddressOverride": true,
            "resourceProfiles": {"bench": {
                "requests": {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "1"},
                "limits": {"nvidia.com/gpu": "1"},
                "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}],
            }},
        }))
    }
}

fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource {
        group: group.into(),
        version: version.into(),
        api_version: format!("{group}/{version}"),
        kind: kind.into(),
        plural: plural.into(),
    }
}

/// Objects of such a kind where everything is made.
pub fn dynamic(place: &Place<'_>, resource: &ApiResource) -> Api<DynamicObject> {
    Api::namespaced_with(place.client.clone(), NAMESPACE, resource)
}

/// A controller with a command line.
pub struct Contestant<'a> {
    /// Who it is, with what version and how tuned.
    pub name: String,
    /// Whose it is.
    pub project: Project,
    /// Absent: ours.
    rival: Option<&'a Rival>,
    flags: Vec<&'static str>,
    /// How many times as fast as it ours should be.
    pub least: f64,
    /// Whether it is its project's fastest command line.
    pub is_best: bool,
}

/// Ours and then every rival in every tuning, their definitions and needs applied.
pub fn contestants<'a>(place: &Place<'_>, rivals: &'a [Rival]) -> Result<Vec<Contestant<'a>>> {
    let mut all = vec![Contestant {
        name: Project::Cachalot.name().into(),
        project: Project::Cachalot,
        rival: None,
        flags: Vec::new(),
        least: 1.0,
        is_best: true,
    }];
    for rival in rivals {
        let crds = rival.crds.display().to_string();
        place
            .cluster
            .kubectl(&["apply", "--server-side", "-f", &crds])?;
        for object in rival.project.needs() {
            place.cluster.apply(NAMESPACE, &object.to_string())?;
        }
        let tunings = rival.project.tunings();
        let best = tunings.len() - 1;
        for (index, (words, flags)) in tunings.into_iter().enumerate() {
            all.push(Contestant {
                name: format!("{} {} {words}", rival.project.name(), rival.version),
                project: rival.project,
                rival: Some(rival),
                flags,
                // The goals: ten times the fastest at its defaults, five times it when tuned.
                least: if words == DEFAULTS { 10.0 } else { 5.0 },
                is_best: index == best,
            });
        }
    }
    Ok(all)
}

/// A controller at work; stopped when dropped.
pub enum Running {
    /// Ours.
    Ours(Operator),
    /// Another's.
    Theirs(Ended),
}

impl Running {
    /// The number of its process.
    pub fn id(&self) -> u32 {
        match self {
            Self::Ours(operator) => operator.id(),
            Self::Theirs(process) => process.id(),
        }
    }
}

impl Contestant<'_> {
    /// In whose name it comes to the API server.
    pub fn user(&self) -> String {
        match self.rival {
            None => operator::USER.into(),
            Some(rival) => format!("bench-{}", rival.project.name()),
        }
    }

    /// Starts it and waits until it is ready to act.
    pub async fn start(&self, place: &Place<'_>) -> Result<Running> {
        let Some(rival) = self.rival else {
            let operator = Operator::start(place)?;
            operator.wait_leading().await?;
            return Ok(Running::Ours(operator));
        };
        // The lease of one that was killed would hold the next one up.
        place
            .cluster
            .kubectl(&["delete", "leases", "--all", "-n", NAMESPACE])?;
        let name = rival.project.name();
        let config = place.folder.join(format!("{name}.yaml"));
        if let Some(given) = rival.project.config() {
            std::fs::write(&config, serde_json::to_string(&given)?)?;
        }
        let kubeconfig = place.kubeconfig(&self.user())?;
        let mut command = Command::new(&rival.binary);
        if rival.project != Project::KubeAi {
            command.arg(format!("--kubeconfig={}", kubeconfig.display()));
        }
        command
            .args(&self.flags)
            .env("KUBECONFIG", &kubeconfig)
            .env("CONFIG_PATH", &config)
            .env("POD_NAMESPACE", NAMESPACE)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(log(place.folder, rival.project))?);
        let process = Ended::start(&mut command)?;
        tokio::time::sleep(WARM_UP).await;
        Ok(Running::Theirs(process))
    }

    /// What it said last.
    pub fn last_words(&self, place: &Place<'_>) -> String {
        let log = match self.rival {
            None => place.log.to_path_buf(),
            Some(rival) => log(place.folder, rival.project),
        };
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(10).collect();
        tail.join("\n")
    }

    /// Removes its objects and what hangs on them, while it does not run.
    pub async fn clear(&self, place: &Place<'_>) -> Result<()> {
        if self.rival.is_none() {
            return objects::clear(place.cluster, place.client).await;
        }
        let own = dynamic(place, &self.project.resource());
        free(&own).await?;
        own.delete_collection(&DeleteParams::default(), &ListParams::default())
            .await?;
        clear_pods(place.client).await?;
        for kind in self.project.dependents() {
            let left = dynamic(place, &kind);
            free(&left).await?;
            wait_for(LOOK, || async {
                let left = count(&left, &ListParams::default()).await?;
                Ok((left > 0).then(|| format!("{left} {} are still there", kind.plural)))
            })
            .await?;
        }
        Ok(())
    }
}

/// Takes the finalizers off all objects of a kind: nobody else finishes their deletion while their controller does not run.
async fn free(objects: &Api<DynamicObject>) -> Result<()> {
    let all = objects.list_metadata(&ListParams::default()).await?.items;
    let held = all
        .into_iter()
        .filter(|one| one.metadata.finalizers.is_some());
    let (without, how) = (
        &Patch::Merge(json!({"metadata": {"finalizers": null}})),
        &PatchParams::default(),
    );
    let freed = held
        .filter_map(|one| one.metadata.name)
        .map(|name| async move {
            match objects.patch_metadata(&name, how, without).await {
                // It went meanwhile.
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
                other => other.map(drop),
            }
        });
    try_join_all(freed).await.map(drop).map_err(Into::into)
}

fn log(folder: &Path, project: Project) -> PathBuf {
    folder.join(format!("{}.log", project.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_for_a_rival_is_whole_or_says_what_is_missing() {
        let given = |text: &str| vec![text.parse::<Given>().expect("NAME=VALUE")];
        let all =
            rivals(&given("kthena=k"), &given("kthena=c"), &given("kthena=v1")).expect("whole");
        assert_eq!((all.len(), all[0].project), (1, Project::Kthena));
        let why = rivals(&given("kubeai=k"), &[], &[]).expect_err("no definitions");
        assert!(why.to_string().contains("--rival-crds kubeai="), "{why}");
        let why = rivals(&[], &given("aibrix=c"), &[]).expect_err("no binary");
        assert!(why.to_string().contains("no --rival for aibrix"), "{why}");
        for wrong in ["kubeai", "kubeai=", "other=x", "cachalot=x"] {
            assert!(wrong.parse::<Given>().is_err(), "{wrong}");
        }
    }
    #[test]
    fn an_object_is_ready_when_its_status_says_so_of_all_replicas_and_of_what_is_asked_now() {
        let statuses = [
            (
                Project::Cachalot,
                json!({"replicas": 3, "readyReplicas": 3, "updatedReplicas": 3}),
            ),
            (Project::KubeAi, json!({"replicas": {"all": 3, "ready": 3}})),
            (
                Project::Kthena,
                json!({"replicas": 3, "availableReplicas": 3}),
            ),
            (Project::AiBrix, json!({"replicas": 3, "readyReplicas": 3})),
        ];
        for (project, status) in statuses {
            let mut object = project.object("x", 3).expect("an object");
            assert_eq!(object.data["spec"]["replicas"], json!(3), "{project:?}");
            assert!(!project.is_at(&object, 3), "{project:?} has no status yet");
            object.metadata.generation = Some(2);
            object.data["status"] = status;
            object.data["status"]["observedGeneration"] = json!(2);
            assert!(project.is_at(&object, 3), "{project:?}");
            assert!(!project.is_at(&object, 2), "{project:?}");
            object.metadata.generation = Some(3);
            assert_eq!(
                project.is_at(&object, 3),
                project == Project::KubeAi,
                "{project:?}"
            );
        }
    }
}
