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

#[cfg(test)]
mod tests {
    //! Verbs against an in-memory API: what they leave there, and how they end.

    use k8s_openapi::api::apps::v1::Deployment;
    use k8s_openapi::api::core::v1::{ConfigMap, Pod};
    use knarr_client::testing::FakeApi;

    use crate::cli::run_with;

    async fn run(api: &FakeApi, line: &str) -> i32 {
        run_with(api.client(), &line.split(' ').collect::<Vec<_>>()).await
    }

    fn manifest(directory: &tempfile::TempDir, text: &str) -> String {
        let path = directory.path().join("m.yaml");
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn a_deployment_is_made_scaled_changed_and_deleted() {
        let api = FakeApi::new();
        assert_eq!(run(&api, "create deployment web --image=nginx:latest --replicas=2").await, 0);
        assert_eq!(run(&api, "create deployment web --image=nginx:latest").await, 1, "the name is taken");
        assert_eq!(run(&api, "patch deployment web -p {\"spec\":{\"replicas\":5}}").await, 0);
        assert_eq!(run(&api, "set image deployment/web nginx=nginx:next").await, 0);
        assert_eq!(run(&api, "set image deployment/web other=x").await, 1, "there is no such container");
        assert_eq!(run(&api, "label deployment web tier=front").await, 0);
        assert_eq!(run(&api, "label deployment web tier=back").await, 1, "--overwrite is missing");
        let found = api.objects::<Deployment>().remove(0);
        let spec = found.spec.expect("it has a spec");
        assert_eq!(spec.replicas, Some(5));
        let image = spec.template.spec.expect("it has pods").containers.remove(0).image;
        assert_eq!(image.as_deref(), Some("nginx:next"));
        assert_eq!(found.metadata.labels.expect("it has labels")["tier"], "front");
        assert_eq!(run(&api, "get deployment web -o yaml").await, 0);
        assert_eq!(run(&api, "delete deployment web").await, 0);
        assert!(api.objects::<Deployment>().is_empty());
        assert_eq!(run(&api, "delete deployment web").await, 1);
        assert_eq!(run(&api, "delete deployment web --ignore-not-found").await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn applying_again_writes_nothing_and_a_change_is_written_once() {
        let (api, directory) = (FakeApi::new(), tempfile::tempdir().expect("a directory"));
        let text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {a: '1', b: '2'}\n";
        let path = manifest(&directory, text);
        let apply = format!("apply -f {path}");
        assert_eq!(run(&api, &apply).await, 0);
        assert_eq!(api.take_writes().len(), 1);
        assert_eq!(run(&api, &apply).await, 0);
        assert!(api.take_writes().is_empty(), "nothing changed");
        manifest(&directory, &text.replace("'1', b: '2'", "'3'"));
        assert_eq!(run(&api, &apply).await, 0);
        assert_eq!(api.take_writes().len(), 1);
        let data = api.objects::<ConfigMap>().remove(0).data.expect("it has data");
        assert_eq!(data.into_iter().collect::<Vec<_>>(), [("a".to_owned(), "3".to_owned())]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dry_run_writes_nothing() {
        let api = FakeApi::new();
        for line in [
            "create deployment web --image=nginx --dry-run=client -o yaml",
            "run x --image=nginx --dry-run=client",
            "create configmap c --from-literal=a=b --dry-run=client",
        ] {
            assert_eq!(run(&api, line).await, 0, "{line}");
        }
        assert!(api.take_writes().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_when_the_pod_is_there_or_too_late() {
        let api = FakeApi::new();
        assert_eq!(run(&api, "wait --for=create pod/x --timeout=5s").await, 1);
        let late = async {
            tokio::time::sleep(std::time::Duration::from_secs(3)).await;
            run(&api, "run x --image=nginx").await
        };
        let (waited, made) = tokio::join!(run(&api, "wait --for=create pod/x --timeout=30s"), late);
        assert_eq!((waited, made), (0, 0));
        assert_eq!(api.objects::<Pod>().len(), 1);
        assert_eq!(run(&api, "wait --for=condition=Ready pod/x --timeout=2s").await, 1);
    }

    #[tokio::test]
    async fn what_is_not_built_is_refused() {
        let api = FakeApi::new();
        for line in [
            "top nodes",
            "completion bash",
            "apply -k dir",
            "get pods -o go-template={{.x}}",
            "apply -f https://x/y",
        ] {
            assert_eq!(run(&api, line).await, 1, "{line}");
        }
    }
}
