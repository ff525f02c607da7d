//! Generates the messages with a generator in plain Rust: no `protoc` is needed.

use std::path::PathBuf;
use std::{env, fs};

use protobuf_codegen_pure::{Codegen, Customize};

fn main() {
    println!("cargo:rerun-if-changed=eraftpb.proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    Codegen::new()
        .input("eraftpb.proto")
        .include(".")
        .out_dir(&out)
        .customize(Customize {
            carllerche_bytes_for_bytes: Some(true),
            ..Customize::default()
        })
        .run()
        .expect("eraftpb.proto can be generated");
    // `include!` takes no inner attributes: they stand at the including module.
    let file = out.join("eraftpb.rs");
    let text = fs::read_to_string(&file).expect("the generated file can be read");
    let text: String = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .flat_map(|line| [line, "\n"])
        .collect();
    fs::write(&file, text).expect("the generated file can be written");
}
