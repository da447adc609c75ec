//! Deletion: at once or with grace, with preconditions, and what finalizers it leaves to the garbage collector.

use std::sync::Arc;

use knarr_api::object::Object;
use knarr_api::rules::Rules;
use knarr_api::schema::Kind;
use knarr_api::status::{Result, Status};
use knarr_api::time;
use knarr_store::{Entry, Expect, Write, WriteError};
use serde_json::{Value, json};

use super::{CONFLICT_RETRIES_MAX, Context, Endpoint, Outcome, Place, Registry, partition};
use crate::admission::{self, Operation};
use crate::request::Query;
use crate::{encode, quota};

/// `metav1.DeleteOptions`.
#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    pub grace_period_seconds: Option<i64>,
    pub uid: Option<String>,
    pub resource_version: Option<String>,
    pub propagation: Option<String>,
    /// Nothing is deleted; said here or in the query.
    pub dry_run: bool,
}

impl DeleteOptions {
    /// Reads the body, or the query where there is no body.
    pub fn read(body: &Value, query: &Query) -> Result<DeleteOptions> {
        let text = |path: &str| Some(body.str_at(path).to_owned()).filter(|s| !s.is_empty());
        let orphan = body.at("orphanDependents").and_then(Value::as_bool);
        let orphan = orphan.or_else(|| query.get("orphanDependents").map(|v| v == "true"));
        let named = text("propagationPolicy").or_else(|| query.get("propagationPolicy").map(str::to_owned));
        if orphan.is_some() && named.is_some() {
            return Err(Status::new(
                422,
                "Invalid",
                "DeleteOptions.meta.k8s.io \"\" is invalid: propagationPolicy: Invalid value: \"\": orphanDependents and deletionPropagation cannot be both set",
            ));
        }
        let propagation = match (named, orphan) {
            (Some(policy), _) if !matches!(policy.as_str(), "Orphan" | "Background" | "Foreground") => {
                return Err(Status::new(
                    422,
                    "Invalid",
                    format!(
                        "DeleteOptions.meta.k8s.io \"\" is invalid: propagationPolicy: Unsupported value: {policy:?}: supported values: \"Foreground\", \"Background\", \"Orphan\""
                    ),
                ));
            }
            (Some(policy), _) => Some(policy),
            (None, Some(true)) => Some("Orphan".to_owned()),
            (None, Some(false)) => Some("Background".to_owned()),
            (None, None) => None,
        };
        let dry_run: Vec<&str> =
            body.list_at("dryRun").iter().map(|v| v.as_str().unwrap_or_default()).collect();
        if dry_run.iter().any(|value| *value != "All") {
            let shown = format!("{:?}", body.list_at("dryRun")).replace("String(", "").replace(')', "");
            let text = format!(
                "DeleteOptions.meta.k8s.io \"\" is invalid: dryRun: Unsupported value: {shown}: supported values: \"All\""
            );
            return Err(Status::new(422, "Invalid", text));
        }
        Ok(DeleteOptions {
            dry_run: !dry_run.is_empty(),
            grace_period_seconds: match body.int_at("gracePeriodSeconds") {
                Some(seconds) => Some(seconds),
                None => query.number("gracePeriodSeconds")?,
            },
            uid: text("preconditions.uid"),
            resource_version: text("preconditions.resourceVersion"),
            propagation,
        })
    }
}

impl Registry {
    /// Deletes an object, at once or gracefully; true if it is gone.
    pub async fn delete(
        &self,
        place: Place<'_>,
        options: &DeleteOptions,
        context: &Context,
    ) -> Result<(Outcome, bool)> {
        for _ in 0..CONFLICT_RETRIES_MAX {
            let entry = self.get(place)?;
            let old = encode::decode(&entry);
            check_preconditions(place, &old, options)?;
            admission::validate(self, (Operation::Delete, Endpoint::Main), place, &old, Some(&old), context)?;
            let Some(new) = self.mark_deleted(place.kind, &old, options) else {
                return Ok((Outcome::Stored(entry), false));
            };
            let gone = is_finished(&new);
            if context.dry_run || options.dry_run {
                return Ok((Outcome::Shown(new), gone));
            }
            let written = if gone {
                self.remove(place.kind, &entry, &new, None).await
            } else {
                let write = Write {
                    partition: partition(place.kind).into(),
                    key: entry.key.clone(),
                    expect: Expect::Revision(entry.revision),
                    change: encode::put(place.kind, &new, None),
                };
                self.store.commit(write).await
            };
            match written {
                Ok(committed) => {
                    if gone {
                        quota::released(self, place.namespace).await;
                    }
                    return Ok((Outcome::Stored(committed.entry), gone));
                }
                Err(WriteError::Changed(_)) => {}
                Err(WriteError::NotFound) => return Err(place.not_found()),
                Err(other) => return Err(self.write_failed(&other)),
            }
        }
        Err(Status::modified(place.kind, place.name))
    }

    /// The object as a deletion leaves it; `None` if that is what it already is.
    fn mark_deleted(&self, kind: &Kind, old: &Value, options: &DeleteOptions) -> Option<Value> {
        let mut new = old.clone();
        set_policy_finalizer(kind, &mut new, options);
        let grace = grace_seconds(kind, &new, options);
        let pending = old.at("metadata.deletionTimestamp").is_some();
        if pending {
            let current = old.int_at("metadata.deletionGracePeriodSeconds").unwrap_or(0);
            let shorter = options.grace_period_seconds.is_some() && grace < current;
            // Once without grace, finalizers alone hold it: asked again, nothing changes.
            let forced = kind.plural == "pods" && options.grace_period_seconds == Some(0) && current > 0;
            if !shorter && !forced && new == *old {
                return if is_finished(&new) { Some(new) } else { None };
            }
            if shorter || forced {
                self.stamp(&mut new, grace);
            }
            return Some(new);
        }
        self.stamp(&mut new, grace);
        if kind.resource() == "namespaces" {
            new.set_at("status.phase", "Terminating");
        }
        if Rules::of(kind).generation && !is_finished(&new) {
            new.set_at("metadata.generation", old.int_at("metadata.generation").unwrap_or(0) + 1);
        }
        Some(new)
    }

    fn stamp(&self, object: &mut Value, grace: i64) {
        let at = (self.clock)() + jiff::SignedDuration::from_secs(grace);
        object.set_at("metadata.deletionTimestamp", time::print(at, 0));
        object.set_at("metadata.deletionGracePeriodSeconds", grace);
    }

    pub(super) async fn remove(
        &self,
        kind: &Kind,
        entry: &Arc<Entry>,
        last: &Value,
        owners: Option<&str>,
    ) -> std::result::Result<knarr_store::Committed, WriteError> {
        let write = Write {
            partition: partition(kind).into(),
            key: entry.key.clone(),
            expect: Expect::Revision(entry.revision),
            change: encode::delete(kind, last, owners),
        };
        let committed = self.store.commit(write).await?;
        self.services.release(self, kind, last).await;
        Ok(committed)
    }
}

/// Marked for deletion, with no grace left and nobody to wait for.
pub(super) fn is_finished(object: &Value) -> bool {
    object.at("metadata.deletionTimestamp").is_some()
        && object.list_at("metadata.finalizers").is_empty()
        && object.int_at("metadata.deletionGracePeriodSeconds").unwrap_or(0) == 0
        && (object.str_at("kind") != "Namespace" || object.list_at("spec.finalizers").is_empty())
}

fn check_preconditions(place: Place, object: &Value, options: &DeleteOptions) -> Result<()> {
    for (name, wanted, path, fate) in [
        ("UID", &options.uid, "metadata.uid", "deleted and then recreated"),
        ("ResourceVersion", &options.resource_version, "metadata.resourceVersion", "modified"),
    ] {
        let have = object.str_at(path);
        if let Some(wanted) = wanted.as_deref().filter(|w| *w != have) {
            let why = format!(
                "the {name} in the precondition ({wanted}) does not match the {name} in record ({have}). The object might have been {fate}"
            );
            // Upstream names the kind here, not the resource.
            let kind = place.kind;
            let named = if kind.group.is_empty() {
                kind.kind.clone()
            } else {
                format!("{}.{}", kind.kind, kind.group)
            };
            let mut status = Status::conflict(kind, place.name, "");
            status.message = format!("Operation cannot be fulfilled on {named} {:?}: {why}", place.name);
            status.details.get_or_insert_default()["kind"] = json!(kind.kind);
            return Err(status);
        }
    }
    Ok(())
}

/// Orphaning and foreground deletion are finalizers that the garbage collector removes.
fn set_policy_finalizer(kind: &Kind, object: &mut Value, options: &DeleteOptions) {
    let had: Vec<Value> = object.list_at("metadata.finalizers").to_vec();
    let has = |name: &str| had.iter().any(|f| f == name);
    let policy = match options.propagation.as_deref() {
        Some(policy) => policy,
        None if has("orphan") => "Orphan",
        None if has("foregroundDeletion") => "Foreground",
        None if Rules::of(kind).orphans_by_default => "Orphan",
        None => "Background",
    };
    let mut finalizers: Vec<Value> =
        had.into_iter().filter(|f| f != "orphan" && f != "foregroundDeletion").collect();
    match policy {
        "Orphan" => finalizers.push(json!("orphan")),
        "Foreground" => finalizers.push(json!("foregroundDeletion")),
        _ => {}
    }
    if finalizers.is_empty() {
        object.remove_at("metadata.finalizers");
    } else {
        object.set_at("metadata.finalizers", finalizers);
    }
}

/// Only pods have a grace period: what runs somewhere needs time to stop.
fn grace_seconds(kind: &Kind, object: &Value, options: &DeleteOptions) -> i64 {
    if kind.resource() != "pods" {
        return 0;
    }
    let finished = matches!(object.str_at("status.phase"), "Failed" | "Succeeded");
    if object.str_at("spec.nodeName").is_empty() || finished {
        return 0;
    }
    let wanted = options.grace_period_seconds.or_else(|| object.int_at("spec.terminationGracePeriodSeconds"));
    match wanted.unwrap_or(30) {
        negative if negative < 0 => 1,
        seconds => seconds,
    }
}
