//! One file per command, and what training commands have in common before the first step.

mod begin;
pub mod bench;
pub mod config;
pub mod data;
pub mod demo;
pub mod doctor;
pub mod embed;
mod encoding;
pub mod evaluate;
pub mod export;
pub mod fewlabel;
pub mod finetune;
mod gallery;
pub mod inspect;
pub mod map;
pub mod neighbors;
mod next;
pub mod predict;
pub mod pretrain;
pub mod probe;
mod probing;
pub mod replay;
