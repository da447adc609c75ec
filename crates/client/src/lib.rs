//! One client for in-process and remote use; shared informers, work queues, leader election, events.
