//! What can go wrong when containers are asked for, as the kubelet needs to tell it apart.
//! Texts are for people; [`Kind`] is for code.

use std::fmt;

/// The class of a failure; decides what the caller does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// No such sandbox, container or image. On removal this counts as success.
    NotFound,
    /// A name is already taken by another object.
    AlreadyExists,
    /// The request can never succeed as written (bad reference, unknown user, hostile archive).
    InvalidArgument,
    /// The object is in the wrong state (exec in a stopped container, start of a started one).
    FailedPrecondition,
    /// Asked for something this runtime does not do; the message says what.
    Unsupported,
    /// The registry refused the credentials, or wants some.
    Unauthorized,
    /// Registry, runtime or keeper cannot be reached right now; worth retrying with back-off.
    Unavailable,
    /// The time allowed ran out.
    DeadlineExceeded,
    /// The executable of a container or exec could not be started.
    CannotRun,
    /// Anything else.
    Internal,
}

/// A failed step. `Display` gives the whole chain: the step, the value, the cause.
#[derive(Debug, Clone)]
pub struct Error {
    pub kind: Kind,
    pub message: String,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidArgument, message)
    }

    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    pub fn is_not_found(&self) -> bool {
        self.kind == Kind::NotFound
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        use tonic::Code;
        let kind = match status.code() {
            Code::NotFound => Kind::NotFound,
            Code::AlreadyExists => Kind::AlreadyExists,
            Code::InvalidArgument => Kind::InvalidArgument,
            Code::FailedPrecondition => Kind::FailedPrecondition,
            Code::Unimplemented => Kind::Unsupported,
            Code::Unauthenticated | Code::PermissionDenied => Kind::Unauthorized,
            Code::Unavailable => Kind::Unavailable,
            Code::DeadlineExceeded => Kind::DeadlineExceeded,
            _ => Kind::Internal,
        };
        Self::new(kind, status.message().to_owned())
    }
}

/// Adds the failed step to an error, keeping its kind where it has one.
pub trait Context<T> {
    /// `step` reads like "mount overlay on /x": what was being done, with the value.
    fn step(self, step: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for Result<T, std::io::Error> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| Error::internal(format!("{}: {cause}", step())))
    }
}

impl<T> Context<T> for Result<T, nix::Error> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| Error::internal(format!("{}: {}", step(), cause.desc())))
    }
}

impl<T> Context<T> for Result<T, serde_json::Error> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| Error::internal(format!("{}: {cause}", step())))
    }
}

impl<T> Context<T> for Result<T, Error> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| Error::new(cause.kind, format!("{}: {}", step(), cause.message)))
    }
}
