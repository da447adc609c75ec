//! Imports under way: who asks for an image that is not here waits while it may still come.

use tokio::sync::watch;

/// Counts announced imports. Clones share the count.
#[derive(Clone)]
pub struct Imports {
    /// Announced and not ended; also changed after each image.
    under_way: watch::Sender<usize>,
}

/// Until dropped, imports are under way.
pub struct Importing {
    imports: Imports,
}

impl Imports {
    pub fn new() -> Self {
        Imports { under_way: watch::Sender::new(0) }
    }

    /// Announces imports to come.
    pub fn announce(&self) -> Importing {
        self.under_way.send_modify(|count| *count += 1);
        Importing { imports: self.clone() }
    }

    /// Has those who wait look again.
    pub fn arrived(&self) {
        self.under_way.send_modify(|_| {});
    }

    /// For who looks for an image: look, and while it is not there, wait for [`Arrivals::next`] and look again.
    pub fn arrivals(&self) -> Arrivals {
        let mut changes = self.under_way.subscribe();
        // Before the first look: what comes during it counts as next.
        let more_to_come = *changes.borrow_and_update() > 0;
        Arrivals { changes, more_to_come }
    }
}

/// See [`Imports::arrivals`].
pub struct Arrivals {
    changes: watch::Receiver<usize>,
    more_to_come: bool,
}

impl Arrivals {
    /// Waits until something has come; false if nothing was to come at the last look.
    pub async fn next(&mut self) -> bool {
        if !self.more_to_come || self.changes.changed().await.is_err() {
            return false;
        }
        self.more_to_come = *self.changes.borrow_and_update() > 0;
        true
    }
}

impl Default for Imports {
    fn default() -> Self {
        Imports::new()
    }
}

impl Drop for Importing {
    fn drop(&mut self) {
        self.imports.under_way.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_asks_waits_for_imports_and_no_longer() {
        let imports = Imports::new();
        assert!(!imports.arrivals().next().await, "nothing is announced");
        let importing = imports.announce();
        let mut arrivals = imports.arrivals();
        imports.arrived();
        assert!(arrivals.next().await, "what came between look and wait counts");
        let waiting = tokio::spawn(async move { (arrivals.next().await, arrivals.next().await) });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "more is to come");
        drop(importing);
        assert_eq!(waiting.await.unwrap(), (true, false), "one last look after the end");
    }
}
