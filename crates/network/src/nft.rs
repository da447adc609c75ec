//! The firewall: scripts in, atomic transactions out.
//!
//! A script is what `nft -f` reads; it is applied whole or not at all. Elements of sets and maps, which are
//! many and change often, go to the kernel directly: `nft` takes a second to read fifty thousand, and twenty
//! milliseconds to start and look at what is there before it adds one. What the rules say is the business of
//! [`crate::builtin`] (table `knarr_pods`) and [`crate::proxy`] (table `knarr`).

use std::process::Stdio;

use async_trait::async_trait;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::error::{NetworkError, Result};

/// How much of an error of `nft` is kept; it quotes the whole offending line, which can be megabytes.
const ERROR_LEN_MAX: usize = 600;

/// The rim to the kernel's packet filter.
#[async_trait]
pub trait Firewall: Send + Sync {
    /// Applies a script as one transaction in the network namespace of this process.
    async fn apply(&self, script: &str) -> Result<()>;

    /// Applies changes of elements of an `inet` table as one transaction.
    async fn change(&self, table: &'static str, changes: Vec<Change>) -> Result<()>;

    /// Runs `nft -j ARGS` and returns its JSON.
    async fn query(&self, args: &[&str]) -> Result<serde_json::Value>;
}

/// One change of a set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Add {
        set: &'static str,
        element: Element,
    },
    Delete {
        set: &'static str,
        key: Vec<u8>,
    },
    /// Deletes all elements.
    Flush {
        set: &'static str,
    },
}

/// One element as the kernel sees it: fields in network byte order (packet marks in the host's), each padded
/// to four bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    pub key: Vec<u8>,
    pub data: Data,
}

/// What an element of a map leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// A set has none.
    None,
    Value(Vec<u8>),
    Goto(String),
    Drop,
}

/// The real one: the `nft` program for scripts, netlink for elements.
#[derive(Clone, Copy, Debug, Default)]
pub struct NftProgram;

#[async_trait]
impl Firewall for NftProgram {
    async fn apply(&self, script: &str) -> Result<()> {
        let step = "apply rules";
        let mut child = nft(&["-f", "-"]).stdin(Stdio::piped()).spawn().map_err(|e| not_run(step, e))?;
        let mut stdin = child.stdin.take().expect("stdin was asked to be a pipe");
        // Reading what nft says while it is still being fed keeps two full pipes from waiting for each other.
        let (fed, output) = tokio::join!(
            async move {
                let fed = stdin.write_all(script.as_bytes()).await;
                drop(stdin);
                fed
            },
            child.wait_with_output()
        );
        let output = output.map_err(|e| not_run(step, e))?;
        if output.status.success() {
            return fed.map_err(|e| not_run(step, e));
        }
        Err(NetworkError::Nftables { step, reason: shorten(&output.stderr) })
    }

    async fn change(&self, table: &'static str, changes: Vec<Change>) -> Result<()> {
        let step = "change elements";
        let failed = |reason: String| NetworkError::Nftables { step, reason };
        match tokio::task::spawn_blocking(move || batch::send(table, &changes)).await {
            Ok(sent) => sent.map_err(|error| failed(error.to_string())),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    async fn query(&self, args: &[&str]) -> Result<serde_json::Value> {
        let step = "list rules";
        let output = nft(&["-j"]).args(args).output().await.map_err(|e| not_run(step, e))?;
        if !output.status.success() {
            return Err(NetworkError::Nftables { step, reason: shorten(&output.stderr) });
        }
        serde_json::from_slice(&output.stdout)
            .map_err(|error| NetworkError::Nftables { step, reason: error.to_string() })
    }
}

/// Whether the `inet` table exists.
pub async fn table_exists(firewall: &dyn Firewall, name: &str) -> Result<bool> {
    let listing = firewall.query(&["list", "tables"]).await?;
    let tables = listing["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    Ok(tables.iter().any(|entry| entry["table"]["family"] == "inet" && entry["table"]["name"] == name))
}

/// Whether a chain of the `inet` table has rules; false if it cannot be found out.
pub async fn has_rules(firewall: &dyn Firewall, table: &str, chain: &str) -> bool {
    let listing = firewall.query(&["list", "chain", "inet", table, chain]).await;
    listing.is_ok_and(|listing| {
        listing["nftables"].as_array().is_some_and(|list| list.iter().any(|entry| !entry["rule"].is_null()))
    })
}

/// A script that removes the table whether it exists or not (`destroy` needs a newer nft than Debian 12's).
pub fn remove_table(name: &str) -> String {
    format!("add table inet {name}\ndelete table inet {name}\n")
}

fn nft(args: &[&str]) -> Command {
    let mut command = Command::new("nft");
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    // systemd units and sudo may leave the system directories out.
    if let Some(path) = std::env::var_os("PATH") {
        let mut dirs: Vec<_> = std::env::split_paths(&path).collect();
        dirs.extend(["/usr/sbin".into(), "/sbin".into()]);
        if let Ok(path) = std::env::join_paths(dirs) {
            command.env("PATH", path);
        }
    }
    command
}

fn not_run(step: &'static str, error: std::io::Error) -> NetworkError {
    let advice = match error.kind() {
        std::io::ErrorKind::NotFound => "; install the package nftables",
        _ => "",
    };
    NetworkError::Nftables { step, reason: format!("cannot run nft: {error}{advice}") }
}

fn shorten(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let text = text.trim();
    match text.char_indices().nth(ERROR_LEN_MAX) {
        Some((end, _)) => format!("{} ...", &text[..end]),
        None => text.to_owned(),
    }
}

mod batch {
    //! Elements in netlink's nftables dialect.

    use std::io;
    use std::os::fd::AsFd;

    use netlink_sys::protocols::NETLINK_NETFILTER;
    use netlink_sys::{Socket, SocketAddr};
    use nix::libc::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST};
    use nix::sys::socket::setsockopt;
    use nix::sys::socket::sockopt::SndBufForce;

    use super::{Change, Data, Element};
    use crate::netlink::{self, MessageBuilder};

    const SUBSYSTEM: u16 = 10;
    const BATCH_BEGIN: u16 = 0x10;
    const BATCH_END: u16 = 0x11;
    const NEW_ELEMENTS: u16 = 12;
    const DELETE_ELEMENTS: u16 = 14;
    const FAMILY_INET: u8 = 1;
    const LIST_TABLE: u16 = 1;
    const LIST_SET: u16 = 2;
    const LIST_ELEMENTS: u16 = 3;
    const LIST_ELEMENT: u16 = 1;
    const ELEMENT_KEY: u16 = 1;
    const ELEMENT_DATA: u16 = 2;
    const DATA_VALUE: u16 = 1;
    const DATA_VERDICT: u16 = 2;
    const VERDICT_CODE: u16 = 1;
    const VERDICT_CHAIN: u16 = 2;
    const GOTO: i32 = -4;
    const DROP: i32 = 0;
    /// Elements in one message: an attribute's length has sixteen bits, an element at most about 120 bytes.
    const ELEMENTS_MAX: usize = 400;
    /// Room the kernel asks for besides the message.
    const SPARE: usize = 4096;

    /// Sends all changes in one batch, which the kernel applies whole or not at all.
    pub fn send(table: &str, changes: &[Change]) -> io::Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let bytes = encode(table, changes);
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        setsockopt(&socket.as_fd(), SndBufForce, &(bytes.len() + SPARE))?;
        socket.send(&bytes, 0)?;
        netlink::read_answers(&socket, |_| {})
    }

    fn encode(table: &str, changes: &[Change]) -> Vec<u8> {
        let mut bytes = control(BATCH_BEGIN);
        let mut rest = changes;
        while let Some(first) = rest.first() {
            let alike =
                rest.iter().take(ELEMENTS_MAX).take_while(|change| same_message(first, change)).count();
            let (some, after) = rest.split_at(alike);
            rest = after;
            // Only the last is acknowledged; a failure anywhere is reported in any case.
            let flags = NLM_F_REQUEST | if rest.is_empty() { NLM_F_ACK } else { 0 };
            bytes.extend(message(table, some, flags));
        }
        bytes.extend(control(BATCH_END));
        bytes
    }

    fn control(kind: u16) -> Vec<u8> {
        MessageBuilder::new(0, kind, NLM_F_REQUEST as u16, 0).resource(SUBSYSTEM).build()
    }

    fn same_message(a: &Change, b: &Change) -> bool {
        match (a, b) {
            (Change::Add { set: a, .. }, Change::Add { set: b, .. }) => a == b,
            (Change::Delete { set: a, .. }, Change::Delete { set: b, .. }) => a == b,
            // The first of a run; flushes go alone.
            (Change::Flush { set: a }, Change::Flush { set: b }) => std::ptr::eq(*a, *b),
            _ => false,
        }
    }

    fn message(table: &str, changes: &[Change], flags: i32) -> Vec<u8> {
        let (operation, flags, set) = match &changes[0] {
            Change::Add { set, .. } => (NEW_ELEMENTS, flags | NLM_F_CREATE, set),
            Change::Delete { set, .. } | Change::Flush { set } => (DELETE_ELEMENTS, flags, set),
        };
        let mut message = MessageBuilder::new(SUBSYSTEM, operation, flags as u16, FAMILY_INET);
        message.attribute(LIST_TABLE, &zero_ended(table));
        message.attribute(LIST_SET, &zero_ended(set));
        if !matches!(changes[0], Change::Flush { .. }) {
            let list = message.open(LIST_ELEMENTS);
            for change in changes {
                match change {
                    Change::Add { element, .. } => write_element(&mut message, &element.key, Some(element)),
                    Change::Delete { key, .. } => write_element(&mut message, key, None),
                    Change::Flush { .. } => {}
                }
            }
            message.close(list);
        }
        message.build()
    }

    fn write_element(message: &mut MessageBuilder, key: &[u8], element: Option<&Element>) {
        let place = message.open(LIST_ELEMENT);
        let inner = message.open(ELEMENT_KEY);
        message.attribute(DATA_VALUE, key);
        message.close(inner);
        match element.map(|element| &element.data) {
            None | Some(Data::None) => {}
            Some(Data::Value(value)) => {
                let inner = message.open(ELEMENT_DATA);
                message.attribute(DATA_VALUE, value);
                message.close(inner);
            }
            Some(Data::Goto(chain)) => write_verdict(message, GOTO, Some(chain)),
            Some(Data::Drop) => write_verdict(message, DROP, None),
        }
        message.close(place);
    }

    fn write_verdict(message: &mut MessageBuilder, code: i32, chain: Option<&str>) {
        let data = message.open(ELEMENT_DATA);
        let verdict = message.open(DATA_VERDICT);
        message.attribute(VERDICT_CODE, &code.to_be_bytes());
        if let Some(chain) = chain {
            message.attribute(VERDICT_CHAIN, &zero_ended(chain));
        }
        message.close(verdict);
        message.close(data);
    }

    fn zero_ended(text: &str) -> Vec<u8> {
        [text.as_bytes(), &[0]].concat()
    }
}

#[cfg(test)]
pub mod testing {
    //! A firewall that only takes notes.

    use parking_lot::Mutex;

    use super::*;

    /// Remembers every script and change; answers every query with nothing.
    #[derive(Default)]
    pub struct Recorder {
        pub scripts: Mutex<Vec<String>>,
        pub changes: Mutex<Vec<Vec<Change>>>,
    }

    #[async_trait]
    impl Firewall for Recorder {
        async fn apply(&self, script: &str) -> Result<()> {
            self.scripts.lock().push(script.to_owned());
            Ok(())
        }

        async fn change(&self, _: &'static str, changes: Vec<Change>) -> Result<()> {
            self.changes.lock().push(changes);
            Ok(())
        }

        async fn query(&self, _: &[&str]) -> Result<serde_json::Value> {
            Ok(serde_json::json!({ "nftables": [] }))
        }
    }
}
