//! What knarr and its keeper say to each other: one JSON message per packet on a `SOCK_SEQPACKET` socket, with
//! file descriptors beside it where told. Requests carry a number that the reply repeats; events come unasked.
//!
//! The keeper outlives upgrades of knarr, so messages only ever gain optional fields.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cri::ContainerExit;

/// Longest message either side accepts.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Most descriptors beside one message.
pub const FDS_MAX: usize = 3;

#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    pub seq: u64,
    pub op: Op,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Op {
    /// Who is there and what runs. Answer: [`Answer::Hello`].
    Hello,
    /// Builds and starts a container. Answer: [`Answer::Started`], with the terminal's descriptor if it has one.
    Start(StartContainer),
    /// Takes over a container whose keeper died. A terminal's descriptor comes along. Answer: [`Answer::Done`]; if
    /// the process is gone, its exit follows as an event.
    Adopt(AdoptContainer),
    /// Runs a command in a container. Descriptors: stdin, stdout, stderr, each as `streams` tells; none with a
    /// terminal. Answer: [`Answer::Started`], with the terminal's descriptor if asked for.
    Exec(StartExec),
    Signal {
        id: String,
        signal: i32,
    },
    KillExec {
        exec: u64,
    },
    /// Sends a copy of the container's output to the descriptors beside the message.
    Attach {
        id: String,
        stdout: bool,
        stderr: bool,
    },
    /// Lets the container see the end of its input (`stdinOnce`).
    CloseStdin {
        id: String,
    },
    ReopenLog {
        id: String,
    },
    /// Answer: [`Answer::Done`] with the descriptor.
    Terminal {
        id: String,
    },
    /// Drops a container that has exited.
    Forget {
        id: String,
    },
    /// Starts the first process of a pod's shared process namespace. Answer: [`Answer::Started`].
    StartPodInit {
        sandbox: String,
    },
    StopPodInit {
        sandbox: String,
    },
    /// Ends the keeper. Refused while containers run.
    Exit,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StartContainer {
    pub id: String,
    /// Holds `config.json`, the rootfs, the pipes `stdin`, `stdout`, `stderr`; gets `exit.json`.
    pub bundle: PathBuf,
    /// Where libcontainer keeps its state.
    pub oci_root: PathBuf,
    /// Directories of the container's control group, to join.
    pub cgroup_dirs: Vec<PathBuf>,
    /// Directories shown to the container, in the order of its spec's mounts.
    pub cgroup_views: Vec<PathBuf>,
    /// Mounts whose propagation libcontainer does not set, in the order of `staged_path`.
    #[serde(default)]
    pub staged_mounts: Vec<StagedMount>,
    pub terminal: bool,
    pub stdin: Stdin,
    /// `None`: output is dropped.
    pub log_path: Option<PathBuf>,
    /// Tells how many processes of the container the kernel killed for lack of memory.
    pub oom_file: Option<PathBuf>,
}

/// A path of the host, bound beforehand where the spec's mount finds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagedMount {
    pub source: PathBuf,
    /// Later mounts of the host below it are to appear in the container, too.
    pub follows_host: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stdin {
    /// Reads end of file at once.
    Null,
    /// Stays open until the container ends.
    Open,
    /// Closes when the first attached client is done.
    Once,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AdoptContainer {
    pub container: StartContainer,
    pub pid: i32,
    /// Start time of the process in clock ticks since boot: a pid alone may have been reused.
    pub start_ticks: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StartExec {
    pub id: String,
    pub oci_root: PathBuf,
    /// Path of the OCI process description.
    pub process: PathBuf,
    pub terminal: bool,
    /// Which of stdin, stdout, stderr have a descriptor; the others are `/dev/null`.
    pub streams: [bool; 3],
    pub cgroup_dirs: Vec<PathBuf>,
    /// The container's bundle; also holds, for a moment, the socket over which the terminal arrives.
    pub bundle: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum FromKeeper {
    Reply { seq: u64, result: Result<Answer, Failure> },
    Event(Event),
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Done,
    Hello { pid: i32, running: Vec<Running> },
    Started { pid: i32, start_ticks: u64, exec: u64 },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Running {
    pub id: String,
    pub pid: i32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    NotFound,
    /// The command could not be executed.
    CannotRun,
    Internal,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// The record is also in the bundle's `exit.json`, written before this is sent.
    ContainerExited {
        id: String,
        exit: ContainerExit,
    },
    ExecExited {
        exec: u64,
        code: i32,
    },
}
