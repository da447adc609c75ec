//! Pod network and service proxy.
