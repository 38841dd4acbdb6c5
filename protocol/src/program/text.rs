//! The canonical text form of a program, and its hash.

use std::fmt;

use sha2::{Digest, Sha256};

use super::{Kind, Node, Op, Program, Type};

/// Version of the text form and of the meaning of operations; part of every hash.
const FORM: u32 = 1;

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Ring => write!(f, "ring")?,
            Kind::Bits { planes } => write!(f, "bits{planes}")?,
        }
        write!(
            f,
            "{:?} f{} b{}",
            self.shape, self.frac_bits, self.bound_log2
        )
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Const(tensor) => {
                let mut hash = Sha256::new();
                for word in tensor.data() {
                    hash.update(word.to_le_bytes());
                }
                write!(f, "Const({})", hex(&hash.finalize()))
            }
            Op::Lookup {
                position,
                width,
                open_bits,
                tables,
            } => {
                let mut hash = Sha256::new();
                for table in tables {
                    hash.update([table.out_bits]);
                    for value in &table.values {
                        hash.update(value.to_le_bytes());
                    }
                }
                let count = tables.len();
                let digest = hex(&hash.finalize());
                write!(
                    f,
                    "Lookup(position={position} width={width} open={open_bits} tables={count} {digest})"
                )
            }
            Op::Input(name) => write!(f, "Input({name:?})"),
            Op::Carried(name) => write!(f, "Carried({name:?})"),
            Op::CarriedMasked(name) => write!(f, "CarriedMasked({name:?})"),
            other => write!(f, "{other:?}"),
        }
    }
}

fn write_node(f: &mut fmt::Formatter<'_>, program: &Program, node: &Node) -> fmt::Result {
    write!(f, "  ")?;
    for (i, out) in node.outs.iter().enumerate() {
        write!(f, "{}%{}", if i > 0 { ", " } else { "" }, out.0)?;
    }
    write!(f, " = {}", node.op)?;
    for input in &node.ins {
        write!(f, " %{}", input.0)?;
    }
    for out in &node.outs {
        write!(f, " : {}", program.ty(*out))?;
    }
    writeln!(f)
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "program {:?} form {FORM} ring {}",
            self.name, self.ring_bits
        )?;
        let mut scope = u16::MAX;
        for node in &self.nodes {
            if node.scope != scope {
                scope = node.scope;
                writeln!(f, " {}:", self.scopes[usize::from(scope)])?;
            }
            write_node(f, self, node)?;
        }
        for output in &self.outputs {
            writeln!(f, "  {:?} {:?} %{}", output.sink, output.name, output.val.0)?;
        }
        Ok(())
    }
}

impl Program {
    /// SHA-256 of the text form: what the nodes compare before any share moves.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.to_string().as_bytes()).into()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
