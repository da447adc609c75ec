//! From arguments to a verb, and from its result to an exit code.

use clap::error::ErrorKind;
use clap::{ArgAction, Command, CommandFactory, Parser};

use crate::context::{Context, GlobalArgs};
use crate::error::Error;
use crate::verbs::{self, Verb};

/// kubectl controls the Kubernetes cluster manager.
#[derive(Parser)]
#[command(name = "kubectl", disable_version_flag = true, disable_help_subcommand = true)]
struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    verb: Verb,
}

/// Runs kubectl with the arguments that follow its name, and returns the exit code.
pub fn main(args: Vec<String>) -> i32 {
    rustls::crypto::ring::default_provider().install_default().ok();
    let cli = match Cli::try_parse_from(plain_booleans(&args)) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, &args),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Error::plain(format!("start the event loop: {error}"))),
    };
    let result = runtime.block_on(async {
        let context = Context::new(cli.global);
        verbs::run(cli.verb, &context).await
    });
    // Reading a terminal may still block a thread of the runtime; the process need not wait for it.
    runtime.shutdown_background();
    result.map_or_else(|error| report(&error), |()| 0)
}

fn report(error: &Error) -> i32 {
    let text = error.to_string();
    if !text.is_empty() {
        eprintln!("{text}");
    }
    error.exit_code()
}

/// What clap refuses, in upstream's words and with its exit code.
fn refuse(error: &clap::Error, args: &[String]) -> i32 {
    let verb = args.iter().find(|a| !a.starts_with('-')).map(String::as_str).unwrap_or_default();
    let context = |kind| error.get(kind).map(ToString::to_string).unwrap_or_default();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // Nothing can be done about a closed standard output.
            let _ = error.print();
            return 0;
        }
        ErrorKind::InvalidSubcommand => {
            let unknown = context(clap::error::ContextKind::InvalidSubcommand);
            eprintln!("error: unknown command {unknown:?} for \"kubectl\"");
        }
        ErrorKind::UnknownArgument => {
            let flag = context(clap::error::ContextKind::InvalidArg);
            let flag = flag.split(['=', ' ']).next().unwrap_or_default();
            eprintln!("error: unknown flag: {flag}\nSee 'kubectl {verb} --help' for usage.");
        }
        _ => eprint!("{error}"),
    }
    1
}

/// Runs a command line against a client, in the namespace `default`; returns the code `main` would.
#[cfg(test)]
pub async fn run_with(client: kube::Client, line: &[&str]) -> i32 {
    let args: Vec<String> = line.iter().map(|word| (*word).to_owned()).collect();
    let mut cli = Cli::try_parse_from(plain_booleans(&args)).unwrap_or_else(|e| panic!("{line:?}: {e}"));
    cli.global.namespace.get_or_insert_with(|| "default".into());
    let context = Context::with_client(client, cli.global);
    verbs::run(cli.verb, &context).await.map_or_else(|error| report(&error), |()| 0)
}

/// Upstream lets every boolean flag be written `--flag=true` and `--flag=false`; clap knows only `--flag`.
fn plain_booleans(args: &[String]) -> Vec<String> {
    let (mut switches, mut valued) = (Vec::new(), Vec::new());
    let command = Cli::command();
    let verb = args.iter().find_map(|arg| command.find_subcommand(arg));
    for command in std::iter::once(&command).chain(verb) {
        collect_flags(command, &mut switches, &mut valued);
    }
    let mut result = vec!["kubectl".to_owned()];
    let mut rest = args.iter();
    for arg in rest.by_ref() {
        if arg == "--" {
            result.push(arg.clone());
            break;
        }
        let switch = arg.strip_prefix("--").and_then(|a| a.split_once('='));
        match switch
            .filter(|(name, _)| switches.iter().any(|s| s == name) && !valued.iter().any(|v| v == name))
        {
            Some((name, "true")) => result.push(format!("--{name}")),
            Some((_, "false")) => {}
            _ => result.push(arg.clone()),
        }
    }
    result.extend(rest.cloned());
    result
}

fn collect_flags(command: &Command, switches: &mut Vec<String>, valued: &mut Vec<String>) {
    for arg in command.get_arguments() {
        let Some(long) = arg.get_long() else { continue };
        let list = if matches!(arg.get_action(), ArgAction::SetTrue) { &mut *switches } else { &mut *valued };
        list.push(long.to_owned());
    }
    // The root's subcommands are the other verbs; only the verb at hand has any of interest.
    if command.get_name() != "kubectl" {
        command.get_subcommands().for_each(|sub| collect_flags(sub, switches, valued));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn boolean_flags_take_values_as_upstream_lets_them() {
        let args = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        for (given, plain) in [
            ("get pods --watch=true", "kubectl get pods --watch"),
            ("get pods --watch=false", "kubectl get pods"),
            ("delete pod x --wait=false", "kubectl delete pod x --wait=false"),
            ("exec x -- cmd --watch=true", "kubectl exec x -- cmd --watch=true"),
        ] {
            assert_eq!(plain_booleans(&args(given)).join(" "), plain);
        }
    }

    #[test]
    fn everyday_commands_parse() {
        for line in [
            "get pods -o wide -n default",
            "-n x get po,svc -A",
            "get pods -w --no-headers",
            "get pods -ojsonpath={.items}",
            "create deployment web --image=nginx:latest --replicas=3",
            "create -f x.yaml",
            "apply -f a -f b -R",
            "delete deployment,service web",
            "delete pod x --wait=false --grace-period=0 --force",
            "logs x --tail=-1 -f",
            "exec -it x -c c -- sh -c ls",
            "exec x -- cat /etc/hostname",
            "scale deployment web --replicas=5",
            "patch deployment web -p {}",
            "rollout status deployment/web --timeout=60s",
            "rollout undo deployment/web --to-revision=2",
            "set image deployment/web nginx=nginx:next",
            "set env deployment/web A=b C-",
            "expose deployment web --port=80 --type=NodePort",
            "port-forward deployment/web 18080:80",
            "wait --for=condition=Ready pod/client --timeout=60s",
            "version",
            "api-resources",
            "label pod x a=b c- --overwrite",
            "run x --image=y --restart=Never -- sh -c true",
            "create secret generic s --from-literal=a=b",
            "config get-contexts",
            "auth can-i get pods",
            "explain pod.spec",
        ] {
            let args = line.split(' ').map(str::to_owned).collect::<Vec<_>>();
            if let Err(error) = Cli::try_parse_from(plain_booleans(&args)) {
                panic!("{line}: {error}");
            }
        }
    }
}
