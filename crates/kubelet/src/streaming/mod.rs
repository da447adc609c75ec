//! The wire format of exec, attach and port-forward: SPDY/3.1, as older clients speak it, and WebSockets. Framing
//! ([`spdy`], [`websocket`]) knows nothing of either use; [`remotecommand`] and [`portforward`] are the uses.

pub mod portforward;
pub mod remotecommand;
pub mod spdy;
pub mod websocket;
