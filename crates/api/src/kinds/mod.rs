//! The strategies of the built-in kinds, one registry line each; kinds not listed follow the default rules.

pub mod apps;
pub mod batch;
pub mod core;
pub mod custom;
pub mod extension;
pub mod flowcontrol;
pub mod networking;
pub mod pod;
pub mod policy;
pub mod rbac;
pub mod resources;
pub mod service;
pub mod storage;

use crate::rules::Rules;

/// API group, plural, strategy.
pub const RULES: &[(&str, &str, Rules)] = &[
    ("", "configmaps", core::CONFIG_MAP),
    ("", "endpoints", core::ENDPOINTS),
    ("", "events", core::EVENT),
    ("", "limitranges", core::LIMIT_RANGE),
    ("", "namespaces", core::NAMESPACE),
    ("", "nodes", core::NODE),
    ("", "persistentvolumeclaims", storage::PERSISTENT_VOLUME_CLAIM),
    ("", "persistentvolumes", storage::PERSISTENT_VOLUME),
    ("", "pods", pod::POD),
    ("", "podtemplates", pod::POD_TEMPLATE),
    ("", "replicationcontrollers", apps::REPLICATION_CONTROLLER),
    ("", "resourcequotas", core::RESOURCE_QUOTA),
    ("", "secrets", core::SECRET),
    ("", "serviceaccounts", core::SERVICE_ACCOUNT),
    ("", "services", service::SERVICE),
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations", extension::WEBHOOKS),
    ("admissionregistration.k8s.io", "validatingwebhookconfigurations", extension::WEBHOOKS),
    ("apiextensions.k8s.io", "customresourcedefinitions", custom::DEFINITION),
    ("apiregistration.k8s.io", "apiservices", extension::API_SERVICE),
    ("apps", "controllerrevisions", apps::CONTROLLER_REVISION),
    ("apps", "daemonsets", apps::DAEMON_SET),
    ("apps", "deployments", apps::DEPLOYMENT),
    ("apps", "replicasets", apps::REPLICA_SET),
    ("apps", "statefulsets", apps::STATEFUL_SET),
    ("autoscaling", "horizontalpodautoscalers", policy::AUTOSCALER),
    ("batch", "cronjobs", batch::CRON_JOB),
    ("batch", "jobs", batch::JOB),
    ("certificates.k8s.io", "certificatesigningrequests", extension::CERTIFICATE_SIGNING_REQUEST),
    ("coordination.k8s.io", "leases", core::LEASE),
    ("discovery.k8s.io", "endpointslices", core::ENDPOINT_SLICE),
    ("events.k8s.io", "events", core::EVENTS_EVENT),
    ("flowcontrol.apiserver.k8s.io", "flowschemas", flowcontrol::FLOW_SCHEMA),
    ("flowcontrol.apiserver.k8s.io", "prioritylevelconfigurations", flowcontrol::PRIORITY_LEVEL),
    ("networking.k8s.io", "ingressclasses", networking::INGRESS_CLASS),
    ("networking.k8s.io", "ingresses", networking::INGRESS),
    ("networking.k8s.io", "ipaddresses", networking::IP_ADDRESS),
    ("networking.k8s.io", "networkpolicies", networking::NETWORK_POLICY),
    ("networking.k8s.io", "servicecidrs", networking::SERVICE_CIDR),
    ("node.k8s.io", "runtimeclasses", extension::RUNTIME_CLASS),
    ("policy", "poddisruptionbudgets", policy::DISRUPTION_BUDGET),
    ("rbac.authorization.k8s.io", "clusterrolebindings", rbac::BINDING),
    ("rbac.authorization.k8s.io", "clusterroles", rbac::ROLE),
    ("rbac.authorization.k8s.io", "rolebindings", rbac::BINDING),
    ("rbac.authorization.k8s.io", "roles", rbac::ROLE),
    ("scheduling.k8s.io", "priorityclasses", core::PRIORITY_CLASS),
    ("storage.k8s.io", "csidrivers", storage::CSI_DRIVER),
    ("storage.k8s.io", "csinodes", storage::CSI_NODE),
    ("storage.k8s.io", "csistoragecapacities", storage::CSI_STORAGE_CAPACITY),
    ("storage.k8s.io", "storageclasses", storage::STORAGE_CLASS),
    ("storage.k8s.io", "volumeattachments", storage::VOLUME_ATTACHMENT),
    ("storage.k8s.io", "volumeattributesclasses", storage::VOLUME_ATTRIBUTES_CLASS),
];
