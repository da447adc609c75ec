//! The strategies of the built-in kinds, one registry line each; kinds not listed follow the default rules.

pub mod apps;
pub mod batch;
pub mod core;
pub mod pod;
pub mod rbac;
pub mod service;

use crate::rules::Rules;

/// API group, plural, strategy.
pub const RULES: &[(&str, &str, Rules)] = &[
    ("", "configmaps", core::CONFIG_MAP),
    ("", "endpoints", core::ENDPOINTS),
    ("", "events", core::EVENT),
    ("", "limitranges", core::LIMIT_RANGE),
    ("", "namespaces", core::NAMESPACE),
    ("", "nodes", core::NODE),
    ("", "persistentvolumeclaims", core::PERSISTENT_VOLUME_CLAIM),
    ("", "persistentvolumes", core::PERSISTENT_VOLUME),
    ("", "pods", pod::POD),
    ("", "podtemplates", pod::POD_TEMPLATE),
    ("", "replicationcontrollers", apps::REPLICATION_CONTROLLER),
    ("", "resourcequotas", core::RESOURCE_QUOTA),
    ("", "secrets", core::SECRET),
    ("", "serviceaccounts", core::SERVICE_ACCOUNT),
    ("", "services", service::SERVICE),
    ("apps", "controllerrevisions", apps::CONTROLLER_REVISION),
    ("apps", "daemonsets", apps::DAEMON_SET),
    ("apps", "deployments", apps::DEPLOYMENT),
    ("apps", "replicasets", apps::REPLICA_SET),
    ("apps", "statefulsets", apps::STATEFUL_SET),
    ("batch", "cronjobs", batch::CRON_JOB),
    ("batch", "jobs", batch::JOB),
    ("coordination.k8s.io", "leases", core::LEASE),
    ("discovery.k8s.io", "endpointslices", core::ENDPOINT_SLICE),
    ("events.k8s.io", "events", core::EVENTS_EVENT),
    ("rbac.authorization.k8s.io", "clusterrolebindings", rbac::BINDING),
    ("rbac.authorization.k8s.io", "clusterroles", rbac::ROLE),
    ("rbac.authorization.k8s.io", "rolebindings", rbac::BINDING),
    ("rbac.authorization.k8s.io", "roles", rbac::ROLE),
    ("scheduling.k8s.io", "priorityclasses", core::PRIORITY_CLASS),
];
