//! Who may use the node's server: holders of a certificate whose organisation is one of the allowed groups. The
//! handshake has proved that the certificate is the cluster's.

use rustls::pki_types::CertificateDer;

/// Whether the client's own certificate names an allowed group.
pub fn is_allowed(certificates: &[CertificateDer<'_>], groups: &[String]) -> bool {
    let Some(certificate) = certificates.first() else { return false };
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(certificate) else { return false };
    let mut organisations = certificate.subject().iter_organization().filter_map(|name| name.as_str().ok());
    organisations.any(|name| groups.iter().any(|group| group == name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair};

    #[test]
    fn only_allowed_groups_get_in() {
        let certificate = |organisation: &str| {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.distinguished_name.push(DnType::CommonName, "someone");
            params.distinguished_name.push(DnType::OrganizationName, organisation);
            params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
        };
        let groups = ["system:masters".to_owned()];
        assert!(is_allowed(&[certificate("system:masters")], &groups));
        assert!(!is_allowed(&[certificate("system:nodes")], &groups));
        assert!(!is_allowed(&[], &groups));
    }
}
