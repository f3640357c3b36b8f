//! Networks as a whole, and their files. One program, as each would compile the networks anew.

mod encoder;
mod export;
mod networks;
mod parity;
mod support;
mod timm;
mod training;
mod weight_files;
mod whole_step;
