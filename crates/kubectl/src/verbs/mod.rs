//! The verbs: one line each, one file each, all of the same shape: `Args` and `run`.

use crate::context::Context;
use crate::error::Result;

macro_rules! verbs {
    ($($(#[$meta:meta])* $variant:ident => $module:ident,)*) => {
        $(pub mod $module;)*

        #[derive(clap::Subcommand)]
        pub enum Verb {
            $($(#[$meta])* $variant(Box<$module::Args>),)*
        }

        /// Runs the verb.
        pub async fn run(verb: Verb, context: &Context) -> Result<()> {
            match verb {
                $(Verb::$variant(args) => Box::pin($module::run(context, *args)).await,)*
            }
        }
    };
}

verbs! {
    /// Create a resource from a file or from stdin.
    Create => create,
    /// Take a replication controller, service, deployment or pod and expose it as a new Kubernetes service.
    Expose => expose,
    /// Run a particular image on the cluster.
    Run => run,
    /// Set specific features on objects.
    Set => set,
    /// Get documentation for a resource.
    Explain => explain,
    /// Display one or many resources.
    Get => get,
    /// Delete resources by file names, stdin, resources and names, or by resources and label selector.
    Delete => delete,
    /// Manage the rollout of a resource.
    Rollout => rollout,
    /// Set a new size for a deployment, replica set, or replication controller.
    Scale => scale,
    /// Display cluster information.
    ClusterInfo => cluster_info,
    /// Mark node as unschedulable.
    Cordon => cordon,
    /// Mark node as schedulable.
    Uncordon => uncordon,
    /// Drain node in preparation for maintenance.
    Drain => drain,
    /// Update the taints on one or more nodes.
    Taint => taint,
    /// Show details of a specific resource or group of resources.
    Describe => describe,
    /// Print the logs for a container in a pod.
    #[command(visible_alias = "log")]
    Logs => logs,
    /// Attach to a running container.
    Attach => attach,
    /// Execute a command in a container.
    Exec => exec,
    /// Forward one or more local ports to a pod.
    PortForward => port_forward,
    /// Inspect authorization.
    Auth => auth,
    /// List events.
    Events => events,
    /// Diff the live version against a would-be applied version.
    Diff => diff,
    /// Apply a configuration to a resource by file name or stdin.
    Apply => apply,
    /// Update fields of a resource.
    Patch => patch,
    /// Replace a resource by file name or stdin.
    Replace => replace,
    /// Edit a resource on the server.
    Edit => edit,
    /// Wait for a specific condition on one or many resources.
    Wait => wait,
    /// Update the labels on a resource.
    Label => label,
    /// Update the annotations on a resource.
    Annotate => annotate,
    /// Print the supported API resources on the server.
    ApiResources => api_resources,
    /// Print the supported API versions on the server, in the form of "group/version".
    ApiVersions => api_versions,
    /// Modify kubeconfig files.
    Config => config,
    /// Print the client and server version information.
    Version => version,
    /// Display resource (CPU/memory) usage.
    Top => top,
    /// Auto-scale a deployment, replica set, stateful set, or replication controller.
    Autoscale => autoscale,
    /// Copy files and directories to and from containers.
    Cp => cp,
    /// Verbs of upstream that are not built.
    #[command(hide = true, aliases = ["kustomize", "proxy", "certificate", "debug", "plugin", "options", "alpha"])]
    Completion => completion,
}
