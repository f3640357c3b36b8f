//! The operations, compiled once in this crate for each element type.
//!
//! A generic function is compiled again by every crate that calls it, and the kernels, each for three instruction sets, are
//! most of what there is to compile. So the generic bodies are reached through a table of function pointers, filled here
//! for `f32`, `bf16` and `f64`: networks, tests and the binary only link them. The contract's `check` runs on the way, and
//! the clock of a device that is profiled.

use super::Cpu;
use crate::{Element, Result};

macro_rules! table {
    ($($module:ident::$operation:ident { $($pass:ident($args:ident)),* $(; $joint:ident($of_both:ident))? })*) => {
        /// Every pass of every operation for the element type `T`.
        #[derive(Debug)]
        pub struct Table<T: Element> {
            $($($pass: for<'a> fn(&Cpu, crate::$module::$args<'a, Cpu, T>) -> Result<()>,)*)*
        }

        impl<T: Element> Table<T> {
            /// To be put into a static of this crate, one for each element type.
            pub(crate) const FILLED: Self = Self { $($($pass: crate::$module::cpu::$pass::<T>,)*)* };
        }

        $(impl<T: Element> crate::$module::$operation<T> for Cpu {
            $(fn $pass(&self, args: crate::$module::$args<'_, Self, T>) -> Result<()> {
                args.check()?;
                let pass = T::on_cpu().$pass;
                match &self.log {
                    None => pass(self, args),
                    Some(log) => log.note(stringify!($pass), args.cost(), || pass(self, args)),
                }
            })*
        })*
    };
}

crate::passes::for_each_pass!(table);
