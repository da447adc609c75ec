//! What an object is: the schema of every kind and the rules that hold for it.
//!
//! Pure: values in, values out. Nothing here knows of storage, sockets or time of day.

pub mod schema;

pub mod apply;
pub mod columns;
pub mod cron;
pub mod decode;
pub mod defaults;
pub mod fieldset;
pub mod kinds;
pub mod open_schema;
pub mod patch;
pub mod pick;
pub mod protobuf;
pub mod rules;
pub mod selector;
pub mod versions;

pub mod fuzz;

pub mod field;
pub mod names;
pub mod object;
pub mod quantity;
pub mod status;
pub mod time;
