//! Eaters: they take memory or processor time until limits bite.

use std::time::{Duration, Instant};

use crate::Outcome;

const MEGABYTE: usize = 1 << 20;
const PAGE: usize = 4096;

/// Takes so many megabytes, a megabyte at a time, and touches every page, so that the kernel has to give it.
pub fn memory(megabytes: usize, hold: Option<Duration>) -> Outcome {
    let mut eaten: Vec<Vec<u8>> = Vec::new();
    for _ in 0..megabytes {
        let mut piece = vec![0_u8; MEGABYTE];
        piece.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
        eaten.push(std::hint::black_box(piece));
    }
    println!("ate {megabytes} MB");
    match hold {
        Some(time) => std::thread::sleep(time),
        None => loop {
            std::thread::park();
        },
    }
    drop(eaten);
    Ok(0)
}

/// Keeps so many cores busy.
pub fn cpu(cores: usize, time: Duration) -> Outcome {
    let end = Instant::now() + time;
    let spin = move || {
        let mut turns = 0_u64;
        while Instant::now() < end {
            for _ in 0..10_000 {
                turns = std::hint::black_box(turns.wrapping_add(1));
            }
        }
    };
    let threads: Vec<_> = (0..cores).map(|_| std::thread::spawn(spin)).collect();
    for thread in threads {
        thread.join().map_err(|_| "an eater panicked".to_owned())?;
    }
    Ok(0)
}
