//! `kubectl cachalot`: asks the planner what it would do and why, without writing anything.
//!
//! Wiring only: arguments, files and lists come in, `operator-core` decides and explains, text goes
//! out. The same function plans here and in the operator, so the two cannot disagree.

mod files;
mod output;
mod source;
mod text;
mod verbs;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::output::Format;
use crate::source::Source;

/// Ends of a command, as exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// What was asked was done.
    Done,
    /// It was done, and something does not fit or is not valid.
    DoesNotFit,
}

/// Exit code of a command that could not be carried out.
const FAILED: u8 = 1;
/// Exit code when something does not fit; 2 is clap's, for arguments that make no sense.
const DOES_NOT_FIT: u8 = 3;

const EXIT_CODES: &str = "Exit codes:
  0  done; everything planned has a place
  1  could not be done: a file, the cluster, or a name
  2  arguments that make no sense
  3  done, and a spec is not valid or a replica has no place";

/// Plans, explains, shows and simulates ModelDeployments. Writes nothing.
#[derive(Parser)]
#[command(
    name = "kubectl-cachalot",
    bin_name = "kubectl cachalot",
    version,
    about,
    after_help = EXIT_CODES,
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Say what the operator would do about the ModelDeployments of a manifest.
    Plan(PlanArguments),
    /// Say for every node why a ModelDeployment is there or not, and what would make it fit.
    Explain(NamedArguments),
    /// Show conditions and pods.
    Status(OptionallyNamedArguments),
    /// Show speed and load: tokens per second, time to first token, KV cache, queue.
    Top(TopArguments),
    /// Tell the sequence of plans that happenings lead to.
    #[command(after_help = HAPPENINGS)]
    Simulate(SimulateArguments),
}

const HAPPENINGS: &str =
    "Happenings are a YAML list; each has afterSeconds (0 when absent) and one of:
  nodeSilent, nodeBack, nodeCordoned, nodeOpened, nodeSick, nodeHealthy, nodeGone: NODE
  nodesJoin: {like: NODE, count: N}
  scale: {name: MDEP, replicas: N}
  patch: {name: MDEP, spec: {…}}      a JSON merge patch
  delete: {name: MDEP}
  replicaFails: {name: MDEP, replica: INDEX}
  wait: {}";

#[derive(Args)]
struct PlanArguments {
    /// Manifest with ModelDeployments and the ConfigMaps they name; - is standard input.
    #[arg(short, long, value_name = "FILE", required = true)]
    filename: Vec<String>,
    #[command(flatten)]
    source: Source,
}

#[derive(Args)]
struct NamedArguments {
    /// mdep/NAME or NAME.
    #[arg(value_name = "NAME")]
    name: String,
    /// Take it from this manifest instead of the cluster.
    #[arg(short, long, value_name = "FILE")]
    filename: Vec<String>,
    #[command(flatten)]
    source: Source,
}

#[derive(Args)]
struct OptionallyNamedArguments {
    /// mdep/NAME or NAME; absent: all of the namespace.
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Of all namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Take ModelDeployments from what `kubectl get mdep -o json` wrote instead of the cluster.
    #[arg(short, long, value_name = "FILE")]
    filename: Vec<String>,
    #[command(flatten)]
    source: Source,
}

#[derive(Args)]
struct TopArguments {
    #[command(flatten)]
    which: OptionallyNamedArguments,
    /// Do not ask pods for their metrics: no time to first token.
    #[arg(long)]
    no_metrics: bool,
}

#[derive(Args)]
struct SimulateArguments {
    /// Manifest with the ModelDeployments that are there at the start; - is standard input.
    #[arg(short, long, value_name = "FILE", required = true)]
    filename: Vec<String>,
    /// What happens, as a YAML list.
    #[arg(long, value_name = "FILE")]
    happenings: Option<String>,
    /// Seconds from bound to ready.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    start_seconds: u64,
    #[command(flatten)]
    source: Source,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // One thread: the work is a handful of lists.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ending = match runtime {
        Ok(runtime) => runtime.block_on(run(cli.verb)),
        Err(error) => Err(error.into()),
    };
    match ending {
        Ok(Ending::Done) => ExitCode::SUCCESS,
        Ok(Ending::DoesNotFit) => ExitCode::from(DOES_NOT_FIT),
        Err(error) => {
            eprintln!("kubectl cachalot: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

async fn run(verb: Verb) -> anyhow::Result<Ending> {
    match verb {
        Verb::Plan(arguments) => verbs::plan(&arguments.filename, &arguments.source).await,
        Verb::Explain(NamedArguments {
            name,
            filename,
            source,
        }) => verbs::explain(&name, &filename, &source).await,
        Verb::Status(which) => verbs::status(&which).await,
        Verb::Top(arguments) => verbs::top(&arguments).await,
        Verb::Simulate(arguments) => verbs::simulate(&arguments).await,
    }
}

impl OptionallyNamedArguments {
    fn format(&self) -> Format {
        self.source.output
    }
}
