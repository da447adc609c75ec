//! `knarr node add` and `remove`, and `up --simulated-nodes`: simulated nodes come and go as Node objects; the server
//! plays every one that carries the label, also after a restart.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use knarr_client::Client;
use knarr_simulated::{NODE_LABEL, NewNode, profile};
use kube::api::{Api, DeleteParams, ListParams, PostParams};

use crate::settings::{self, Settings};

/// Requests under way at a time.
const CONCURRENCY: usize = 32;
/// How long added nodes may take to become Ready, and how often that is looked at.
const READY_MAX: Duration = Duration::from_secs(120);
const READY_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Args, Debug)]
pub struct NodeArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Add nodes to a running cluster.
    Add(AddArgs),
    /// Take nodes away again, those added last first.
    Remove(RemoveArgs),
}

#[derive(Args, Debug)]
struct AddArgs {
    /// How many simulated nodes to add: nodes without a machine, whose pods live as their annotations declare.
    #[arg(long, value_name = "N", required = true)]
    simulated: usize,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    kind: KindArgs,
}

#[derive(Args, Debug)]
struct ClusterArgs {
    /// The cluster [default: the one on this machine].
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    #[arg(long, default_value = settings::DATA_DIR)]
    data_dir: PathBuf,
}

/// What the added nodes are like.
#[derive(Args, Debug)]
struct KindArgs {
    /// Their names are this and a number.
    #[arg(long, default_value = "sim")]
    prefix: String,
    /// What each has, changing the default of cpu=32,memory=256Gi,ephemeral-storage=512Gi,pods=250.
    #[arg(long, value_name = "RESOURCE=QUANTITY,...")]
    capacity: Option<String>,
    /// Spread them over so many zones.
    #[arg(long, default_value_t = 0)]
    zones: usize,
    /// A label for each; repeatable.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    labels: Vec<(String, String)>,
    /// What their pods do by default, such as ready-delay=1s-3s or failure-chance=5%; repeatable. See the user guide.
    #[arg(long = "pods", value_name = "PROPERTY=VALUE", value_parser = pair)]
    properties: Vec<(String, String)>,
    /// Let every pod be scheduled on them. Otherwise, if the cluster has real nodes, a taint keeps pods away that do not
    /// tolerate it.
    #[arg(long)]
    untainted: bool,
}

#[derive(Args, Debug)]
struct RemoveArgs {
    /// How many simulated nodes to remove; without a number, all.
    #[arg(long, value_name = "N", required = true, num_args = 0..=1, default_missing_value = "all")]
    simulated: String,
    #[command(flatten)]
    cluster: ClusterArgs,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not key=value"))?;
    Ok((key.to_owned(), value.to_owned()))
}

/// `knarr node`.
pub fn node(args: &NodeArgs) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match &args.what {
            What::Add(add) => {
                let client = client(&add.cluster).await?;
                let begun = Instant::now();
                let tainted = create(&client, add.simulated, &add.kind).await?;
                let seconds = begun.elapsed().as_secs_f64();
                println!("{} simulated nodes are Ready after {seconds:.1} s.", add.simulated);
                if tainted {
                    println!(
                        "The cluster has real nodes too, so they are tainted: pods need a toleration of {NODE_LABEL:?}, or use --untainted."
                    );
                }
                Ok(())
            }
            What::Remove(remove) => {
                let wanted = match remove.simulated.as_str() {
                    "all" => usize::MAX,
                    number => number.parse().with_context(|| format!("--simulated: {number:?} is no number"))?,
                };
                let removed = delete(&client(&remove.cluster).await?, wanted).await?;
                println!("{removed} simulated nodes were removed.");
                Ok(())
            }
        }
    })
}

/// `knarr up --simulated-nodes N`: brings their number up to `wanted`. Says how many were added.
pub async fn ensure(client: &Client, wanted: usize) -> Result<usize> {
    let known = simulated(client).await?.len();
    let missing = wanted.saturating_sub(known);
    if missing > 0 {
        let kind = KindArgs {
            prefix: "sim".to_owned(),
            capacity: None,
            zones: 0,
            labels: Vec::new(),
            properties: Vec::new(),
            untainted: false,
        };
        create(client, missing, &kind).await?;
    }
    Ok(missing)
}

async fn client(args: &ClusterArgs) -> Result<Client> {
    let kubeconfig = match &args.kubeconfig {
        Some(path) => path.clone(),
        None => Settings::load(&args.data_dir)?
            .with_context(|| {
                format!(
                    "no cluster in {}; make one with `knarr up`, or name one with --kubeconfig",
                    args.data_dir.display()
                )
            })?
            .admin_kubeconfig(),
    };
    knarr_client::connect::from_kubeconfig(&kubeconfig, None).await
}

async fn simulated(client: &Client) -> Result<Vec<Node>> {
    let nodes: Api<Node> = Api::all(client.clone());
    let params = ListParams::default().labels(&format!("{NODE_LABEL}=true"));
    Ok(nodes.list(&params).await.context("list the simulated nodes")?.items)
}

/// Creates nodes and waits until they are Ready; says whether they are tainted.
async fn create(client: &Client, count: usize, kind: &KindArgs) -> Result<bool> {
    let api: Api<Node> = Api::all(client.clone());
    let all = api.list(&ListParams::default()).await.context("list the nodes")?;
    let real = all.iter().any(|node| !labels(node).contains_key(NODE_LABEL));
    let tainted = real && !kind.untainted;
    let taken: Vec<usize> = all.iter().filter_map(|node| number(node, &kind.prefix)).collect();
    let first = taken.into_iter().max().map_or(0, |number| number + 1);
    let new: Vec<Node> = (first..first + count).map(|number| kind.node(number, tainted)).collect();
    let names: Vec<String> = new.iter().filter_map(|node| node.metadata.name.clone()).collect();
    let created = futures::stream::iter(new).map(|node| {
        let api = api.clone();
        async move { api.create(&PostParams::default(), &node).await }
    });
    let mut created = created.buffer_unordered(CONCURRENCY);
    while let Some(result) = created.next().await {
        result.context("create a node")?;
    }
    wait_until_ready(client, &names).await?;
    Ok(tainted)
}

async fn wait_until_ready(client: &Client, names: &[String]) -> Result<()> {
    let deadline = Instant::now() + READY_MAX;
    loop {
        let nodes = simulated(client).await?;
        let ready = nodes.iter().filter(|node| crate::up::is_ready(node));
        let ready =
            ready.filter_map(|node| node.metadata.name.as_ref()).collect::<std::collections::HashSet<_>>();
        let missing = names.iter().filter(|name| !ready.contains(name)).count();
        if missing == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "waited {} s and {missing} of {} simulated nodes are not Ready; is the server running, and of this version?",
                READY_MAX.as_secs(),
                names.len()
            );
        }
        tokio::time::sleep(READY_INTERVAL).await;
    }
}

/// Deletes nodes, the highest numbers first; says how many.
async fn delete(client: &Client, wanted: usize) -> Result<usize> {
    let api: Api<Node> = Api::all(client.clone());
    let mut nodes = simulated(client).await?;
    let age = |node: &Node| {
        let name = node.metadata.name.clone().unwrap_or_default();
        let digits =
            name.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse::<u64>().ok());
        (node.metadata.creation_timestamp.clone(), digits, name)
    };
    nodes.sort_by_key(age);
    let names = nodes.into_iter().rev().take(wanted).filter_map(|node| node.metadata.name);
    let deleted = futures::stream::iter(names).map(|name| {
        let api = api.clone();
        async move {
            api.delete(&name, &DeleteParams::default()).await.with_context(|| format!("delete node {name}"))
        }
    });
    let mut deleted = deleted.buffer_unordered(CONCURRENCY);
    let mut count = 0;
    while let Some(result) = deleted.next().await {
        result?;
        count += 1;
    }
    Ok(count)
}

impl KindArgs {
    fn node(&self, number: usize, tainted: bool) -> Node {
        let mut labels: BTreeMap<String, String> = self.labels.iter().cloned().collect();
        if self.zones > 0 {
            let zone = format!("zone-{}", number % self.zones);
            labels.insert("topology.kubernetes.io/zone".to_owned(), zone);
        }
        let property = |(key, value): &(String, String)| (format!("{}{key}", profile::PREFIX), value.clone());
        let mut annotations: BTreeMap<String, String> = self.properties.iter().map(property).collect();
        if let Some(capacity) = &self.capacity {
            annotations.insert(profile::CAPACITY_KEY.to_owned(), capacity.clone());
        }
        NewNode { name: format!("{}-{number}", self.prefix), labels, annotations, tainted }.object()
    }
}

fn labels(node: &Node) -> BTreeMap<String, String> {
    node.metadata.labels.clone().unwrap_or_default()
}

fn number(node: &Node, prefix: &str) -> Option<usize> {
    node.metadata.name.as_deref()?.strip_prefix(prefix)?.strip_prefix('-')?.parse().ok()
}
