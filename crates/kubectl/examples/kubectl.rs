//! kubectl on its own, for trying it out without the whole binary.

fn main() {
    std::process::exit(knarr_kubectl::main(std::env::args().skip(1).collect()));
}
