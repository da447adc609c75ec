//! A keeper of its own, for this crate's tests. The `knarr` binary is its own keeper.

fn main() {
    let mut args = std::env::args().skip(1);
    assert_eq!(args.next().as_deref(), Some(knarr_runtime::keeper::ARGUMENT), "the first argument");
    std::process::exit(knarr_runtime::keeper::main(args));
}
