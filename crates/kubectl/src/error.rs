//! What went wrong, in kubectl's words.
//!
//! Follows `StandardErrorMessage` and `checkErr` of upstream's `pkg/cmd/util/helpers.go`.

use std::fmt;

use knarr_api::object::Object;
use serde_json::Value;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug)]
pub enum Error {
    /// Our own refusal, printed after `error: `.
    Plain(String),
    /// A whole line (or lines) printed as it is.
    Raw(String),
    /// The API server answered with a `Status`; `during` is upstream's `error when creating "x.yaml"`.
    Server { status: Value, during: Option<String> },
    /// Several targets failed, each in its own way.
    Many(Vec<Error>),
    /// End with this code; what was to be said is said.
    Exit(i32),
}

impl Error {
    pub fn plain(text: impl Into<String>) -> Self {
        Error::Plain(text.into())
    }

    /// A refusal of something upstream has and this client has not.
    pub fn refused(what: &str, instead: &str) -> Self {
        Error::Plain(format!("{what} is not built into this kubectl; {instead}"))
    }

    /// Nothing, one error, or all of them.
    pub fn collect(mut errors: Vec<Error>) -> Result<()> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Error::Many(errors)),
        }
    }

    /// Names what was being done with which source, as `AddSourceToErr` does.
    pub fn when(self, verb: &str, source: &str) -> Self {
        match self {
            Error::Server { status, .. } if !source.is_empty() => {
                Error::Server { status, during: Some(format!("error when {verb} {source:?}: ")) }
            }
            other => other,
        }
    }

    /// The reason of the server's refusal; empty if the server did not answer.
    pub fn reason(&self) -> &str {
        match self {
            Error::Server { status, .. } => status.str_at("reason"),
            _ => "",
        }
    }

    pub fn is_not_found(&self) -> bool {
        self.reason() == "NotFound"
    }

    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Exit(code) => *code,
            _ => 1,
        }
    }

    /// The message without the words around it.
    pub fn message(&self) -> String {
        match self {
            Error::Server { status, .. } => status.str_at("message").to_owned(),
            Error::Plain(text) => text.clone(),
            other => other.to_string(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Plain(text) => write!(f, "error: {text}"),
            Error::Raw(text) => f.write_str(text),
            Error::Server { status, during } => server(f, status, during.as_deref().unwrap_or_default()),
            Error::Many(errors) => {
                let lines: Vec<String> =
                    errors.iter().map(ToString::to_string).filter(|l| !l.is_empty()).collect();
                f.write_str(&lines.join("\n"))
            }
            Error::Exit(_) => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

fn server(f: &mut fmt::Formatter<'_>, status: &Value, during: &str) -> fmt::Result {
    let (reason, message) = (status.str_at("reason"), status.str_at("message"));
    match reason {
        "Unauthorized" => write!(f, "error: You must be logged in to the server ({message})"),
        "Invalid" => invalid(f, status),
        "" => write!(f, "Error from server: {during}{message}"),
        _ => write!(f, "Error from server ({reason}): {during}{message}"),
    }
}

/// `The Pod "x" is invalid: field: why`, one line each when there are several causes.
fn invalid(f: &mut fmt::Formatter<'_>, status: &Value) -> fmt::Result {
    let (kind, name) = (status.str_at("details.kind"), status.str_at("details.name"));
    if kind.is_empty() {
        return write!(f, "The request is invalid: {}", status.str_at("message"));
    }
    write!(f, "The {kind} {name:?} is invalid")?;
    let mut causes: Vec<String> = Vec::new();
    for cause in status.list_at("details.causes") {
        let line = match cause.str_at("field") {
            "" => cause.str_at("message").to_owned(),
            field => format!("{field}: {}", cause.str_at("message")),
        };
        if !causes.contains(&line) {
            causes.push(line);
        }
    }
    match causes.as_slice() {
        [] => Ok(()),
        [one] => write!(f, ": {one}"),
        many => write!(f, ": \n* {}", many.join("\n* ")),
    }
}

/// Why the server could not be reached.
pub fn unreachable(error: &dyn std::error::Error, host: &str) -> Error {
    let mut chain = Vec::new();
    let mut next: Option<&dyn std::error::Error> = Some(error);
    while let Some(here) = next {
        chain.push(here.to_string());
        next = here.source();
    }
    if chain.iter().any(|c| c.to_lowercase().contains("connection refused")) {
        return Error::Raw(format!(
            "The connection to the server {host} was refused - did you specify the right host or port?"
        ));
    }
    let cause = chain.pop().unwrap_or_default();
    Error::Raw(format!("Unable to connect to the server: {cause}"))
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        // A closed pipe behind us (`kubectl get pods | head`) is no failure worth words.
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            Error::Exit(1)
        } else {
            Error::Plain(error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn server_errors_read_as_upstream_prints_them() {
        let not_found = json!({"reason":"NotFound","message":"pods \"x\" not found"});
        let error = |status: &Value| Error::Server { status: status.clone(), during: None };
        assert_eq!(error(&not_found).to_string(), "Error from server (NotFound): pods \"x\" not found");
        assert_eq!(
            error(&not_found).when("deleting", "a.yaml").to_string(),
            "Error from server (NotFound): error when deleting \"a.yaml\": pods \"x\" not found"
        );
        let invalid = json!({"reason":"Invalid","message":"m","details":{"kind":"Pod","name":"x","causes":[
            {"field":"spec.containers","message":"Required value"}]}});
        assert_eq!(error(&invalid).to_string(), "The Pod \"x\" is invalid: spec.containers: Required value");
    }
}
