//! Strategies of jobs and cron jobs.

use serde_json::{Value, json};

use crate::cron::{self, Schedule};
use crate::field;
use crate::kinds::pod;
use crate::object::Object;
use crate::rules::{Errors, Rules, immutable, label_selector, non_negative, one_of};

pub const JOB: Rules = Rules {
    orphans_by_default: true,
    create: |object| {
        object.set_at("status", json!({}));
        generate_selector(object);
    },
    validate: |object, errors| {
        job_spec("spec", object.at("spec").unwrap_or(&Value::Null), errors);
        let (name, completions) = (object.name(), object.int_at("spec.completions").unwrap_or(0));
        if object.str_at("spec.completionMode") == "Indexed" && completions > 0 {
            // The last pod's host name must be a DNS label, or that pod could never be made.
            let longest = format!("{name}-{}", completions - 1);
            if !crate::names::dns_label(&longest).is_empty() {
                let detail = format!("will not able to create pod with invalid DNS label: {longest}");
                errors.push(field::Error::invalid("metadata.name", name, detail));
            }
        }
        label_selector("spec.selector", object.at("spec.selector"), errors);
        if object.at("spec.selector").is_none() {
            errors.push(field::Error::required("spec.selector", ""));
        }
    },
    validate_update: |new, old, errors| {
        immutable("spec.selector", new, old, errors);
        immutable("spec.completionMode", new, old, errors);
        if old.str_at("spec.completionMode") != "Indexed" {
            immutable("spec.completions", new, old, errors);
        }
        let suspended = old.bool_at("spec.suspend") && old.at("status.startTime").is_none();
        if !suspended {
            immutable("spec.template", new, old, errors);
        }
    },
    selectable: &["status.successful"],
    selectable_reads: &["status.succeeded"],
    selectable_value: Some(|object, path| {
        (path == "status.successful").then(|| object.int_at("status.succeeded").unwrap_or(0).to_string())
    }),
    ..Rules::DEFAULT
};

/// The job's pods carry its uid, so that a job never counts another's pods.
///
/// The uid is known here: the registry sets system metadata before the strategy runs.
fn generate_selector(job: &mut Value) {
    if job.bool_at("spec.manualSelector") {
        return;
    }
    let (uid, name) = (job.uid().to_owned(), job.name().to_owned());
    for (key, value) in [
        ("batch.kubernetes.io/controller-uid", &uid),
        ("controller-uid", &uid),
        ("batch.kubernetes.io/job-name", &name),
        ("job-name", &name),
    ] {
        let labels = &mut job["spec"]["template"]["metadata"]["labels"];
        if !labels.is_object() {
            *labels = json!({});
        }
        labels[key] = json!(value);
    }
    job.set_at("spec.selector", json!({ "matchLabels": { "batch.kubernetes.io/controller-uid": uid } }));
}

fn job_spec(path: &str, spec: &Value, errors: &mut Errors) {
    for name in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ] {
        non_negative(path, spec, name, errors);
    }
    one_of(path, spec, "completionMode", &["NonIndexed", "Indexed"], errors);
    one_of(path, spec, "podReplacementPolicy", &["Failed", "TerminatingOrFailed"], errors);
    if spec.str_at("completionMode") == "Indexed" && spec.at("completions").is_none() {
        let detail = "when completion mode is Indexed";
        errors.push(field::Error::required(field::child(path, "completions"), detail));
    }
    let template = field::child(path, "template");
    pod::validate_template(&template, spec.at("template").unwrap_or(&Value::Null), errors);
    let policy = spec.str_at("template.spec.restartPolicy");
    let at = format!("{template}.spec.restartPolicy");
    match policy {
        "OnFailure" | "Never" => {}
        "" | "Always" => errors.push(field::Error::required(at, "valid values: \"OnFailure\", \"Never\"")),
        other => errors.push(field::Error::not_supported(at, other, &["OnFailure", "Never"])),
    }
}

fn schedule(spec: &Value, errors: &mut Vec<field::Error>) {
    let (schedule, zone) = (spec.str_at("schedule"), spec.str_at("timeZone"));
    if schedule.is_empty() {
        errors.push(field::Error::required("spec.schedule", ""));
    } else if schedule.contains("TZ") {
        let detail = "cannot use TZ or CRON_TZ in schedule, use timeZone field instead";
        errors.push(field::Error::invalid("spec.schedule", schedule, detail));
    } else if let Err(why) = Schedule::parse(schedule, None) {
        errors.push(field::Error::invalid("spec.schedule", schedule, why));
    }
    if spec.at("timeZone").is_some_and(|zone| !zone.is_null()) && !cron::is_time_zone(zone) {
        let detail = if zone.is_empty() {
            "timeZone must be nil or non-empty string".to_owned()
        } else {
            format!("unknown time zone {zone}")
        };
        errors.push(field::Error::invalid("spec.timeZone", zone, detail));
    }
}

pub const CRON_JOB: Rules = Rules {
    create: |object| object.set_at("status", json!({})),
    validate: |object, errors| {
        // Eleven characters are for the time that job names end with.
        if object.name().len() > 52 {
            let detail = "must be no more than 52 characters";
            errors.push(field::Error::invalid("metadata.name", object.name(), detail));
        }
        let spec = object.at("spec").unwrap_or(&Value::Null);
        schedule(spec, errors);
        one_of("spec", spec, "concurrencyPolicy", &["Allow", "Forbid", "Replace"], errors);
        for name in ["startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"] {
            non_negative("spec", spec, name, errors);
        }
        job_spec("spec.jobTemplate.spec", spec.at("jobTemplate.spec").unwrap_or(&Value::Null), errors);
    },
    ..Rules::DEFAULT
};
