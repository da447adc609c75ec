//! What can go wrong in a control loop: which step failed, with what, and whether trying again can help.

/// The failure of one step of a loop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or could not be reached. Worth another try, after a back-off.
    #[error("{step}: {source}")]
    Api { step: String, source: Box<kube::Error> },
    /// The world is not ready yet. Worth another try, after a back-off.
    #[error("{step}: {reason}")]
    NotYet { step: String, reason: String },
    /// Trying again cannot help until the object changes; the loop waits for that change.
    #[error("{step}: {reason}")]
    Terminal { step: String, reason: String },
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Names the step a fallible call belongs to.
pub trait During<T> {
    /// Turns the error into [`Error::Api`] that names the step.
    fn during(self, step: impl FnOnce() -> String) -> Result<T>;
}

impl<T> During<T> for std::result::Result<T, kube::Error> {
    fn during(self, step: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Api { step: step(), source: Box::new(source) })
    }
}

impl Error {
    pub fn terminal(step: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::Terminal { step: step.into(), reason: reason.into() }
    }

    pub fn not_yet(step: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::NotYet { step: step.into(), reason: reason.into() }
    }

    /// The `Status` the API server answered with, if it answered.
    pub fn status(&self) -> Option<&kube::core::Status> {
        match self {
            Error::Api { source, .. } => match &**source {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether the API server answered with `code`.
    pub fn is_code(&self, code: u16) -> bool {
        self.status().is_some_and(|status| status.code == code)
    }

    /// The object does not exist.
    pub fn is_not_found(&self) -> bool {
        self.is_code(404)
    }

    /// Someone else wrote first (and it is not that the name is taken).
    pub fn is_conflict(&self) -> bool {
        self.is_code(409) && !self.is_already_exists()
    }

    /// The name is taken.
    pub fn is_already_exists(&self) -> bool {
        self.status().is_some_and(|status| status.reason == "AlreadyExists")
    }

    /// The namespace of a create is being deleted: nothing more will ever be created there.
    pub fn is_namespace_terminating(&self) -> bool {
        self.status().is_some_and(|status| {
            status.code == 403
                && status.details.as_ref().is_some_and(|details| {
                    details.causes.iter().any(|cause| cause.reason == "NamespaceTerminating")
                })
        })
    }

    /// Whether trying again, after a back-off, can help.
    pub fn is_retryable(&self) -> bool {
        !matches!(self, Error::Terminal { .. })
    }
}

/// `Ok(None)` where the object does not exist; other errors pass through.
pub fn or_none<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// `Ok(())` where the object does not exist or was written by someone else meanwhile: the next event decides.
pub fn ignore_gone<T>(result: Result<T>) -> Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}
