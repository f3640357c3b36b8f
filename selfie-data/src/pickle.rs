//! Python pickles of plain values and numpy arrays, protocols 0 to 5, read by an allow-list.
//!
//! A pickle is a program for a stack machine that may call any Python function. This reader runs
//! none: the few functions that numpy's pickles name are values here, and any other is refused by
//! its name. Opcodes: <https://github.com/python/cpython/blob/main/Lib/pickletools.py>.
//!
//! Hostile input costs a small multiple of its size, in memory and in time. An opcode makes at most
//! one small value, and opcodes, nodes and memo are bounded; byte strings are borrowed from the
//! input; lists, tuples and dicts lie in one vector and are named by their place, so sharing is
//! free, cycles do no harm, and nothing here recurses, not even to free memory. Conversions of text
//! may not read more than a few times the input in all.

use std::collections::HashMap;

/// A value; what is larger than a few words lies in its [`Pickle`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    /// Python 2 writes its `str` as this, too.
    Bytes(&'a [u8]),
    Str(&'a str),
    /// A list, tuple, dict, array or copied bytes: its place in the pickle.
    Node(usize),
    /// A function or class that is allowed.
    Global(Global),
}

/// What numpy's pickles of arrays name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Global {
    Reconstruct,
    FromBuffer,
    Scalar,
    Ndarray,
    Dtype,
    Encode,
    Bytes,
}

#[derive(Debug)]
enum Node<'a> {
    List(Vec<Value<'a>>),
    Tuple(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    Bytes(Vec<u8>),
    Dtype(Dtype),
    /// `data` is bytes of any kind; `None` between `_reconstruct` and its state.
    Array {
        dtype: Dtype,
        shape: Shape,
        data: Value<'a>,
    },
}

/// Kind and size of an array's elements, such as `u1`; big-endian ones are refused.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Dtype {
    kind: u8,
    bytes: usize,
}

/// Up to [`MAX_DIMS`] lengths.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Shape {
    dims: [usize; MAX_DIMS],
    len: usize,
}

/// Pictures need four at most.
const MAX_DIMS: usize = 4;

/// Containers and arrays in one pickle; a data set's has a dozen.
const MAX_NODES: usize = 1 << 16;

/// Opcodes and memo entries of a small pickle; a longer one may have one for every 2 and 8 bytes.
const MIN_OPCODES: usize = 1 << 12;

/// An array of bytes, in C order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ByteArray<'p> {
    pub(crate) shape: &'p [usize],
    /// As many as the product of `shape`.
    pub(crate) data: &'p [u8],
}

/// What a pickle holds.
#[derive(Debug)]
pub(crate) struct Pickle<'a> {
    nodes: Vec<Node<'a>>,
    root: Value<'a>,
}

impl<'a> Pickle<'a> {
    /// Reads a whole pickle.
    ///
    /// # Errors
    /// What was found instead of one, and at which byte.
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let mut machine = Machine {
            bytes,
            at: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            nodes: Vec::new(),
            converted: 0,
        };
        for _ in 0..MIN_OPCODES + bytes.len() / 2 {
            let at = machine.at;
            match machine.step() {
                Ok(None) => {}
                Ok(Some(root)) => return Ok(Self { nodes: machine.nodes, root }),
                Err(fault) => return Err(format!("{fault} (byte {at})")),
            }
        }
        Err(format!("more opcodes than data of {} bytes need", bytes.len()))
    }

    /// Entry `key` of the dict that the pickle is.
    pub(crate) fn get(&self, key: &str) -> Option<Value<'a>> {
        let Value::Node(root) = self.root else { return None };
        let Node::Dict(pairs) = &self.nodes[root] else { return None };
        pairs.iter().rev().find(|(name, _)| self.bytes(name) == Some(key.as_bytes())).map(|(_, value)| *value)
    }

    /// The keys of the dict that the pickle is, for messages: at most 8.
    pub(crate) fn keys(&self) -> String {
        let Value::Node(root) = self.root else { return "no dict".into() };
        let Node::Dict(pairs) = &self.nodes[root] else { return "no dict".into() };
        let names = pairs.iter().filter_map(|(name, _)| self.bytes(name)).take(8);
        let names: Vec<_> =
            names.map(|name| String::from_utf8_lossy(&name[..name.len().min(40)]).into_owned()).collect();
        format!("a dict of {}", if names.is_empty() { "nothing".into() } else { names.join(", ") })
    }

    /// The bytes of bytes or text.
    pub(crate) fn bytes<'p>(&'p self, value: &Value<'p>) -> Option<&'p [u8]> {
        match value {
            Value::Bytes(bytes) => Some(bytes),
            Value::Str(text) => Some(text.as_bytes()),
            Value::Node(node) => match &self.nodes[*node] {
                Node::Bytes(bytes) => Some(bytes),
                _ => None,
            },
            _ => None,
        }
    }

    /// The values of a list or tuple.
    pub(crate) fn items(&self, value: &Value<'_>) -> Option<&[Value<'a>]> {
        let Value::Node(node) = value else { return None };
        match &self.nodes[*node] {
            Node::List(items) | Node::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// An array of u8 in C order.
    pub(crate) fn byte_array<'p>(&'p self, value: &Value<'_>) -> Option<ByteArray<'p>> {
        let (dtype, shape, data) = self.array(value)?;
        (dtype == Dtype { kind: b'u', bytes: 1 }).then_some(ByteArray { shape, data })
    }

    /// Whole numbers: a list or tuple of them, or an array of one dimension of signed or unsigned
    /// integers; u64 above `i64::MAX` are none.
    pub(crate) fn integers(&self, value: &Value<'_>) -> Option<Vec<i64>> {
        if let Some(items) = self.items(value) {
            let integer = |item: &Value<'a>| match item {
                Value::Int(number) => Some(*number),
                _ => None,
            };
            return items.iter().map(integer).collect();
        }
        let (dtype, shape, data) = self.array(value)?;
        (shape.len() == 1).then_some(())?;
        data.chunks_exact(dtype.bytes).map(|bytes| little_endian(dtype.kind, bytes)).collect()
    }

    fn array<'p>(&'p self, value: &Value<'_>) -> Option<(Dtype, &'p [usize], &'p [u8])> {
        let Value::Node(node) = value else { return None };
        let Node::Array { dtype, shape, data } = &self.nodes[*node] else { return None };
        let data = self.bytes(data)?;
        Some((*dtype, &shape.dims[..shape.len], data))
    }
}

/// A little-endian integer of up to 8 bytes of numpy's kind `i` or `u`; `None` for other kinds.
pub(crate) fn little_endian(kind: u8, bytes: &[u8]) -> Option<i64> {
    let negative = kind == b'i' && bytes.last().is_some_and(|last| last & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
    match kind {
        b'i' => Some(i64::from_le_bytes(wide)),
        b'u' => u64::from_le_bytes(wide).try_into().ok(),
        _ => None,
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack at the marks.
    marks: Vec<usize>,
    memo: HashMap<u64, Value<'a>>,
    nodes: Vec<Node<'a>>,
    /// Bytes of text that were converted.
    converted: usize,
}

impl<'a> Machine<'a> {
    /// Executes one opcode; the value of the pickle at its end.
    fn step(&mut self) -> Result<Option<Value<'a>>, String> {
        let opcode = self.number(1)? as u8;
        let value = match opcode {
            b'.' => return self.pop().map(Some),
            // PROTO and FRAME.
            0x80 => {
                let protocol = self.number(1)?;
                if protocol > 5 {
                    return Err(format!("pickle protocol {protocol}, of which 0 to 5 are known"));
                }
                return Ok(None);
            }
            0x95 => {
                self.take(8)?;
                return Ok(None);
            }
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'I' => match self.line()? {
                b"00" => Value::Bool(false),
                b"01" => Value::Bool(true),
                digits => Value::Int(parsed(digits)?),
            },
            b'J' => Value::Int(self.number(4)? as i32 as i64),
            b'K' => Value::Int(self.number(1)? as i64),
            b'M' => Value::Int(self.number(2)? as i64),
            b'L' => {
                let line = self.line()?;
                Value::Int(parsed(line.strip_suffix(b"L").unwrap_or(line))?)
            }
            0x8a | 0x8b => {
                let len = self.number(if opcode == 0x8a { 1 } else { 4 })?;
                let bytes = self.take(len)?;
                Value::Int(little_endian(b'i', bytes).ok_or("a whole number of more than 64 bits")?)
            }
            b'F' => Value::Float(parsed(self.line()?)?),
            b'G' => Value::Float(f64::from_bits((self.number(8)?).swap_bytes())),
            b'S' => self.quoted()?,
            b'V' => {
                let line = self.line()?;
                if line.contains(&b'\\') || !line.is_ascii() {
                    self.convert(line.len())?;
                    self.node(Node::Bytes(raw_unicode(line)?.into_bytes()))?
                } else {
                    Value::Str(std::str::from_utf8(line).map_err(|error| error.to_string())?)
                }
            }
            b'U' | b'C' => self.counted(1).map(Value::Bytes)?,
            b'T' | b'B' => self.counted(4).map(Value::Bytes)?,
            0x8e | 0x96 => self.counted(8).map(Value::Bytes)?,
            0x8c => self.text(1)?,
            b'X' => self.text(4)?,
            0x8d => self.text(8)?,
            b']' => self.node(Node::List(Vec::new()))?,
            b'}' => self.node(Node::Dict(Vec::new()))?,
            b')' => self.node(Node::Tuple(Vec::new()))?,
            b'l' => {
                let items = self.marked()?;
                self.node(Node::List(items))?
            }
            b't' => {
                let items = self.marked()?;
                self.node(Node::Tuple(items))?
            }
            0x85..=0x87 => {
                let items = self.last(usize::from(opcode - 0x84))?;
                self.node(Node::Tuple(items))?
            }
            b'd' => {
                let items = self.marked()?;
                let dict = self.node(Node::Dict(Vec::new()))?;
                self.set(dict, &items)?;
                dict
            }
            b'a' => {
                let item = self.last(1)?;
                return self.append(&item).map(|()| None);
            }
            b'e' => {
                let items = self.marked()?;
                return self.append(&items).map(|()| None);
            }
            b's' | b'u' => {
                let items = if opcode == b's' { self.last(2)? } else { self.marked()? };
                let dict = *self.top()?;
                return self.set(dict, &items).map(|()| None);
            }
            b'(' => {
                self.marks.push(self.stack.len());
                return Ok(None);
            }
            b'0' => return self.pop().map(|_| None),
            b'1' => return self.marked().map(|_| None),
            b'2' => *self.top()?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                Value::Global(global(module, name)?)
            }
            0x93 => {
                let names = self.last(2)?;
                match names[..] {
                    [Value::Str(module), Value::Str(name)] => {
                        Value::Global(global(module.as_bytes(), name.as_bytes())?)
                    }
                    _ => return Err("the name of a function that is no text".into()),
                }
            }
            b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                return Err(refusal(module, name));
            }
            b'R' => {
                let call = self.last(2)?;
                self.call(call[0], call[1])?
            }
            b'b' => {
                let state = self.pop()?;
                let object = *self.top()?;
                return self.build(object, state).map(|()| None);
            }
            b'p' | b'q' | b'r' | 0x94 => {
                let key = match opcode {
                    b'p' => parsed(self.line()?)?,
                    b'q' => self.number(1)?,
                    b'r' => self.number(4)?,
                    _ => self.memo.len() as u64,
                };
                let value = *self.top()?;
                self.memo.insert(key, value);
                if self.memo.len() > MIN_OPCODES + self.bytes.len() / 8 {
                    return Err("more memo entries than the data need".into());
                }
                return Ok(None);
            }
            b'g' | b'h' | b'j' => {
                let key = match opcode {
                    b'g' => parsed(self.line()?)?,
                    b'h' => self.number(1)?,
                    _ => self.number(4)?,
                };
                *self.memo.get(&key).ok_or_else(|| format!("a reference to memo {key}, which was never set"))?
            }
            // A buffer is read-only or not; nothing is written here.
            0x98 => return Ok(None),
            b'o' | 0x81 | 0x92 => return Err("a pickle that makes objects of classes".into()),
            b'P' | b'Q' => return Err("a reference to something outside of the pickle".into()),
            0x97 => return Err("an array whose bytes lie outside of the pickle".into()),
            0x82..=0x84 => return Err("a pickle that asks for a registered extension".into()),
            0x8f..=0x91 => return Err("a set".into()),
            other => return Err(format!("{other:#04x}, which is no pickle opcode")),
        };
        self.stack.push(value);
        Ok(None)
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let taken = usize::try_from(len).ok().and_then(|len| rest.get(..len));
        let taken = taken.ok_or_else(|| format!("{} bytes left where {len} are announced", rest.len()))?;
        self.at += taken.len();
        Ok(taken)
    }

    /// A little-endian number of up to 8 bytes.
    fn number(&mut self, bytes: u64) -> Result<u64, String> {
        let mut wide = [0; 8];
        let taken = self.take(bytes)?;
        wide[..taken.len()].copy_from_slice(taken);
        Ok(u64::from_le_bytes(wide))
    }

    /// Up to the end of the line, without it.
    fn line(&mut self) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|byte| *byte == b'\n').ok_or("a line without end")?;
        self.at += end + 1;
        Ok(&rest[..end])
    }

    fn counted(&mut self, bytes: u64) -> Result<&'a [u8], String> {
        let len = self.number(bytes)?;
        self.take(len)
    }

    fn text(&mut self, bytes: u64) -> Result<Value<'a>, String> {
        std::str::from_utf8(self.counted(bytes)?)
            .map(Value::Str)
            .map_err(|error| format!("text that is no UTF-8: {error}"))
    }

    /// A string of protocol 0, in quotes and with escapes.
    fn quoted(&mut self) -> Result<Value<'a>, String> {
        let line = self.line()?;
        let inner = match line {
            [b'\'', inner @ .., b'\''] | [b'"', inner @ .., b'"'] => inner,
            _ => return Err("a string without quotes".into()),
        };
        if !inner.contains(&b'\\') {
            return Ok(Value::Bytes(inner));
        }
        self.convert(inner.len())?;
        self.node(Node::Bytes(unescaped(inner)?))
    }

    /// Accounts for a conversion of so many bytes.
    fn convert(&mut self, bytes: usize) -> Result<(), String> {
        self.converted += bytes;
        // Bytes that protocol 0 writes as text are read twice, the second time as UTF-8.
        if self.converted > 4 * self.bytes.len() {
            return Err("text that is converted over and over".into());
        }
        Ok(())
    }

    fn node(&mut self, node: Node<'a>) -> Result<Value<'a>, String> {
        if self.nodes.len() == MAX_NODES {
            return Err(format!("more than {MAX_NODES} lists, tuples, dicts and arrays"));
        }
        self.nodes.push(node);
        Ok(Value::Node(self.nodes.len() - 1))
    }

    /// Values below the last mark belong to somebody else.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Value<'a>, String> {
        self.last(1).map(|last| last[0])
    }

    fn top(&self) -> Result<&Value<'a>, String> {
        self.stack[self.floor()..].last().ok_or_else(|| "an empty stack".into())
    }

    /// Takes the last `count` values.
    fn last(&mut self, count: usize) -> Result<Vec<Value<'a>>, String> {
        match self.stack.len().checked_sub(count) {
            Some(start) if start >= self.floor() => Ok(self.stack.split_off(start)),
            _ => Err("an empty stack".into()),
        }
    }

    /// Takes the values above the last mark, and the mark.
    fn marked(&mut self) -> Result<Vec<Value<'a>>, String> {
        let mark = self.marks.pop().ok_or("no mark on the stack")?;
        Ok(self.stack.split_off(mark))
    }

    fn append(&mut self, items: &[Value<'a>]) -> Result<(), String> {
        let list = *self.top()?;
        match list {
            Value::Node(node) => match &mut self.nodes[node] {
                Node::List(list) => {
                    list.extend_from_slice(items);
                    Ok(())
                }
                _ => Err("an append to what is no list".into()),
            },
            _ => Err("an append to what is no list".into()),
        }
    }

    fn set(&mut self, dict: Value<'a>, items: &[Value<'a>]) -> Result<(), String> {
        let (pairs, rest) = items.as_chunks::<2>();
        match dict {
            Value::Node(node) if rest.is_empty() => match &mut self.nodes[node] {
                Node::Dict(dict) => {
                    dict.extend(pairs.iter().map(|[key, value]| (*key, *value)));
                    Ok(())
                }
                _ => Err("an entry for what is no dict".into()),
            },
            _ => Err("entries that are no pairs of a dict".into()),
        }
    }

    fn tuple(&self, value: Value<'a>) -> Result<&[Value<'a>], String> {
        match value {
            Value::Node(node) => match &self.nodes[node] {
                Node::Tuple(items) => Ok(items),
                _ => Err("something else where a tuple belongs".into()),
            },
            _ => Err("something else where a tuple belongs".into()),
        }
    }

    /// Does what an allowed function does.
    fn call(&mut self, function: Value<'a>, arguments: Value<'a>) -> Result<Value<'a>, String> {
        let Value::Global(function) = function else { return Err("a call of what is no function".into()) };
        let arguments = self.tuple(arguments)?;
        match (function, arguments) {
            // The state comes with BUILD.
            (Global::Reconstruct, [Value::Global(Global::Ndarray), ..]) => {
                let (dtype, shape) = (Dtype { kind: b'V', bytes: 0 }, Shape { dims: [0; MAX_DIMS], len: 0 });
                self.node(Node::Array { dtype, shape, data: Value::None })
            }
            (Global::FromBuffer, &[data, dtype, shape, order]) => {
                let dtype = self.dtype(dtype)?;
                let shape = self.shape(shape)?;
                if order != Value::Str("C") && shape.len > 1 {
                    return Err("an array in Fortran order".into());
                }
                self.array(dtype, shape, data)
            }
            (Global::Dtype, [Value::Str(_) | Value::Bytes(_), ..]) => {
                let name = match arguments[0] {
                    Value::Str(name) => name.as_bytes(),
                    Value::Bytes(name) => name,
                    _ => b"",
                };
                let dtype = dtype(name)
                    .ok_or_else(|| format!("an array of {}", String::from_utf8_lossy(&name[..name.len().min(40)])))?;
                self.node(Node::Dtype(dtype))
            }
            (Global::Scalar, &[dtype, data]) => {
                let dtype = self.dtype(dtype)?;
                let data = self.data(data).filter(|data| data.len() == dtype.bytes);
                let number = data.and_then(|data| little_endian(dtype.kind, data));
                number.map(Value::Int).ok_or_else(|| "a numpy scalar that is no whole number of 64 bits".into())
            }
            // Python 3 writes bytes for Python 2 as text of the code points 0 to 255.
            (Global::Encode, &[text, Value::Str("latin1" | "latin-1")]) => self.latin1(text),
            (Global::Bytes, []) => Ok(Value::Bytes(b"")),
            (function, _) => Err(format!("a call of {function:?} with other arguments than numpy's")),
        }
    }

    fn latin1(&mut self, text: Value<'a>) -> Result<Value<'a>, String> {
        let len = self.text_of(text)?.len();
        self.convert(len)?;
        let text = self.text_of(text)?;
        let bytes: Option<Vec<u8>> = text.chars().map(|char| u8::try_from(u32::from(char)).ok()).collect();
        let bytes = bytes.ok_or("text beyond latin1 where bytes belong")?;
        self.node(Node::Bytes(bytes))
    }

    /// Text, which protocol 0 may have escaped.
    fn text_of(&self, value: Value<'a>) -> Result<&str, String> {
        match value {
            Value::Str(text) => Ok(text),
            value => {
                let bytes = self.data(value).ok_or("an encoding of what is no text")?;
                std::str::from_utf8(bytes).map_err(|error| format!("text that is no UTF-8: {error}"))
            }
        }
    }

    /// Gives an object its state.
    fn build(&mut self, object: Value<'a>, state: Value<'a>) -> Result<(), String> {
        let Value::Node(node) = object else { return Err("a state for a plain value".into()) };
        let state = self.tuple(state)?;
        match (&self.nodes[node], state) {
            // (version, byte order, ...)
            (Node::Dtype(dtype), [_, order, ..]) => match (order, dtype.bytes) {
                (Value::Str("<" | "|" | "=") | Value::Bytes(b"<" | b"|" | b"="), _) | (_, 1) => Ok(()),
                _ => Err("an array of big-endian numbers".into()),
            },
            // (version, shape, dtype, Fortran order, bytes)
            (Node::Array { .. }, &[_, shape, dtype, fortran, data]) => {
                let (shape, dtype) = (self.shape(shape)?, self.dtype(dtype)?);
                if !matches!(fortran, Value::Bool(false) | Value::Int(0)) && shape.len > 1 {
                    return Err("an array in Fortran order".into());
                }
                let Value::Node(made) = self.array(dtype, shape, data)? else { return Err("no array".into()) };
                self.nodes.swap(node, made);
                Ok(())
            }
            _ => Err("a state for what is no array".into()),
        }
    }

    /// An array, if the bytes are as many as the shape says.
    fn array(&mut self, dtype: Dtype, shape: Shape, data: Value<'a>) -> Result<Value<'a>, String> {
        let dims = &shape.dims[..shape.len];
        let expected = dims.iter().try_fold(dtype.bytes, |product, dim| product.checked_mul(*dim));
        let found = self.data(data).ok_or("an array without bytes")?.len();
        if expected != Some(found) || dtype.bytes == 0 {
            return Err(format!("{found} bytes for an array of shape {dims:?} and {} bytes per element", dtype.bytes));
        }
        self.node(Node::Array { dtype, shape, data })
    }

    fn data(&self, value: Value<'a>) -> Option<&[u8]> {
        match value {
            Value::Bytes(bytes) => Some(bytes),
            Value::Node(node) => match &self.nodes[node] {
                Node::Bytes(bytes) => Some(bytes),
                _ => None,
            },
            _ => None,
        }
    }

    fn dtype(&self, value: Value<'a>) -> Result<Dtype, String> {
        match value {
            Value::Node(node) => match self.nodes[node] {
                Node::Dtype(dtype) => Ok(dtype),
                _ => Err("an array without dtype".into()),
            },
            _ => Err("an array without dtype".into()),
        }
    }

    fn shape(&self, value: Value<'a>) -> Result<Shape, String> {
        let items = self.tuple(value)?;
        if items.len() > MAX_DIMS {
            return Err(format!("an array of {} dimensions", items.len()));
        }
        let mut shape = Shape { dims: [0; MAX_DIMS], len: items.len() };
        for (dim, item) in shape.dims.iter_mut().zip(items) {
            *dim = match item {
                Value::Int(length) => usize::try_from(*length).ok(),
                _ => None,
            }
            .ok_or("the shape of an array that is no shape")?;
        }
        Ok(shape)
    }
}

/// The allow-list.
fn global(module: &[u8], name: &[u8]) -> Result<Global, String> {
    match (module, name) {
        (b"numpy.core.multiarray" | b"numpy._core.multiarray", b"_reconstruct") => Ok(Global::Reconstruct),
        (b"numpy.core.multiarray" | b"numpy._core.multiarray", b"scalar") => Ok(Global::Scalar),
        (b"numpy.core.numeric" | b"numpy._core.numeric", b"_frombuffer") => Ok(Global::FromBuffer),
        (b"numpy", b"ndarray") => Ok(Global::Ndarray),
        (b"numpy", b"dtype") => Ok(Global::Dtype),
        (b"_codecs", b"encode") => Ok(Global::Encode),
        (b"__builtin__" | b"builtins", b"bytes") => Ok(Global::Bytes),
        _ => Err(refusal(module, name)),
    }
}

fn refusal(module: &[u8], name: &[u8]) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(100)]).into_owned();
    format!("this pickle asks for {}.{}, which is never called here", text(module), text(name))
}

/// Numbers without or with a byte order that is ours: `u1`, `<i8`, `f4`.
pub(crate) fn dtype_parts(name: &[u8]) -> Option<(u8, usize)> {
    let name = match name {
        [b'<' | b'|' | b'=', rest @ ..] => rest,
        plain => plain,
    };
    match name {
        [kind @ (b'b' | b'i' | b'u' | b'f'), bytes @ (b'1' | b'2' | b'4' | b'8')] => {
            Some((*kind, usize::from(bytes - b'0')))
        }
        _ => None,
    }
}

fn dtype(name: &[u8]) -> Option<Dtype> {
    dtype_parts(name).map(|(kind, bytes)| Dtype { kind, bytes })
}

fn parsed<T: std::str::FromStr>(digits: &[u8]) -> Result<T, String> {
    let text = std::str::from_utf8(&digits[..digits.len().min(400)]).unwrap_or("");
    text.trim().parse().map_err(|_| format!("`{text}` where a number of at most 64 bits belongs"))
}

/// Undoes Python's escapes of bytes.
fn unescaped(text: &[u8]) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let (byte, taken) = match (first, tail) {
            (b'\\', [b'x', high, low, ..]) => (hexadecimal(&[*high, *low])? as u8, 4),
            (b'\\', [b'n', ..]) => (b'\n', 2),
            (b'\\', [b'r', ..]) => (b'\r', 2),
            (b'\\', [b't', ..]) => (b'\t', 2),
            (b'\\', [same @ (b'\\' | b'\'' | b'"'), ..]) => (*same, 2),
            (b'\\', _) => return Err("an unknown escape in a string".into()),
            (byte, _) => (*byte, 1),
        };
        bytes.push(byte);
        rest = &rest[taken..];
    }
    Ok(bytes)
}

/// Undoes Python's raw-unicode-escape: latin1 with \u and \U.
fn raw_unicode(line: &[u8]) -> Result<String, String> {
    let mut text = String::new();
    let mut rest = line;
    while let [first, tail @ ..] = rest {
        let (code, taken) = match (first, tail) {
            (b'\\', [b'u', digits @ ..]) if digits.len() >= 4 => (hexadecimal(&digits[..4])?, 6),
            (b'\\', [b'U', digits @ ..]) if digits.len() >= 8 => (hexadecimal(&digits[..8])?, 10),
            (byte, _) => (u32::from(*byte), 1),
        };
        text.push(char::from_u32(code).ok_or("an escape that is no character")?);
        rest = &rest[taken..];
    }
    Ok(text)
}

fn hexadecimal(digits: &[u8]) -> Result<u32, String> {
    let mut number = 0;
    for digit in digits {
        number = number << 4 | char::from(*digit).to_digit(16).ok_or("an escape that is not hexadecimal")?;
    }
    Ok(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fault(bytes: &[u8]) -> String {
        Pickle::read(bytes).expect_err("must be refused")
    }

    /// Reads everything of a pickle that a data set asks for.
    fn look(pickle: &Pickle<'_>) {
        pickle.keys();
        for key in ["data", "labels"] {
            if let Some(value) = pickle.get(key) {
                if let Some(array) = pickle.byte_array(&value) {
                    assert_eq!(array.shape.iter().product::<usize>(), array.data.len());
                }
                pickle.integers(&value);
                pickle.bytes(&value);
                pickle.items(&value);
            }
        }
    }

    #[test]
    fn plain_values_of_all_protocols() {
        // {"a": [1, -2, 300, 70000, True], b"b": (None, 1.5)}, by hand.
        let old = b"(dS'a'\n(lI1\naI-2\naI300\naL70000L\naI01\nasS'\\x62'\n(NF1.5\ntp0\ns.";
        let new = b"\x80\x04\x95\0\0\0\0\0\0\0\0}(\x8c\x01a](K\x01J\xfe\xff\xff\xffM,\x01\x8a\x03p\x11\x01\x88eC\x01bNG?\xf8\0\0\0\0\0\0\x86\x94u.";
        for bytes in [old.as_slice(), new] {
            let pickle = Pickle::read(bytes).expect("well formed");
            let list = pickle.get("a").expect("there");
            let expected = [Value::Int(1), Value::Int(-2), Value::Int(300), Value::Int(70_000), Value::Bool(true)];
            assert_eq!(pickle.items(&list), Some(expected.as_slice()));
            assert_eq!(pickle.integers(&list), None, "a bool is no number");
            let pair = pickle.get("b").expect("there");
            assert_eq!(pickle.items(&pair), Some([Value::None, Value::Float(1.5)].as_slice()));
            assert_eq!(pickle.get("c"), None);
        }
        let pickle = Pickle::read(b"(dV\\u00e9\\U0001f600\nVb\xe9\ns.").expect("well formed");
        assert_eq!(pickle.get("é😀").and_then(|text| pickle.bytes(&text).map(<[u8]>::to_vec)), Some("bé".into()));
    }

    #[test]
    fn anything_that_calls_or_reaches_out_is_refused_by_name() {
        for (bytes, part) in [
            (b"cos\nsystem\n(S'echo'\ntR.".as_slice(), "asks for os.system, which is never called here (byte 0)"),
            (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),
            (b"(S'echo'\nios\nsystem\n.", "asks for os.system"),
            (b"cnumpy\nload\n.", "asks for numpy.load"),
            (b"cbuiltins\ngetattr\n.", "asks for builtins.getattr"),
            (b"cnumpy\nndarray\n)\x81.", "objects of classes"),
            (b"cnumpy\nndarray\n)R.", "a call of Ndarray"),
            (b"c_codecs\nencode\n(X\x01\0\0\0aX\x03\0\0\0hextR.", "a call of Encode"),
            (b"Pfile\n.", "outside of the pickle"),
            (b"\x97.", "outside of the pickle"),
            (b"\x82\x01.", "registered extension"),
            (b"\x80\x06.", "protocol 6"),
            (b"\x8b\xff\xff\xff\xff.", "4294967295 are announced"),
            (b"\x8e\0\0\0\0\0\0\0\x10.", "1152921504606846976 are announced"),
            (b"\x8a\x09\x01\x01\x01\x01\x01\x01\x01\x01\x01.", "more than 64 bits"),
            (b"N(.", "an empty stack"),
            (b"h\0.", "memo 0"),
            (b"}(NNNu.", "no pairs"),
            (b"", "0 bytes left"),
            (b"K", "0 bytes left"),
            (b"\xfe", "0xfe"),
        ] {
            let message = fault(bytes);
            assert!(message.contains(part), "{part}: {message}");
        }
    }

    /// An array of the given shape over 6 bytes of data.
    fn array(shape: &[u8]) -> Vec<u8> {
        let start = b"}\x8c\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\x01btR(K\x01(";
        let end = b"tcnumpy\ndtype\n(\x8c\x02u1K\0K\x01tR(K\x03\x8c\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89C\x06abcdeftbs.";
        [start.as_slice(), shape, end].concat()
    }

    #[test]
    fn shapes_must_match_their_bytes() {
        let bytes = array(b"K\x02K\x03");
        let pickle = Pickle::read(&bytes).expect("well formed");
        let data = pickle.get("data").and_then(|data| pickle.byte_array(&data)).expect("an array");
        assert_eq!((data.shape, data.data), ([2, 3].as_slice(), b"abcdef".as_slice()));
        let huge = b"\x8a\x08\0\0\0\0\0\0\0\x10".as_slice();
        for shape in [
            b"K\x02K\x04".as_slice(),
            b"K\x01",
            b"J\xff\xff\xff\xffJ\xfa\xff\xff\xff",
            b"K\x06N",
            huge,
            &[huge, b"K\x10"].concat(),
            b"K\x01K\x01K\x01K\x01K\x06",
        ] {
            let message = fault(&array(shape));
            assert!(
                ["bytes for an array", "no shape", "5 dimensions"].iter().any(|part| message.contains(part)),
                "{message}"
            );
        }
    }

    #[test]
    fn bombs_cost_no_more_than_their_size() {
        // Lists of lists that each hold the one before ten times: 10^2000 values if copied.
        let bomb = [b"]".as_slice(), &b"q\0](h\0h\0h\0h\0h\0h\0h\0h\0h\0h\0e".repeat(2_000), b"."].concat();
        look(&Pickle::read(&bomb).expect("well formed"));
        // A list that holds itself, and 60,000 lists inside each other.
        look(&Pickle::read(b"]q\0h\0a.").expect("well formed"));
        let deep = [b"]".repeat(60_000), b"a".repeat(59_999), b".".to_vec(), vec![0; 200_000]].concat();
        look(&Pickle::read(&deep).expect("well formed"));
        assert!(fault(&[b"]".repeat(70_000), vec![0; 200_000]].concat()).contains("more than 65536 lists"));
        assert!(fault(&b"2".repeat(100_000)).contains("empty stack"));
        assert!(fault(&[b"N".as_slice(), &b"2".repeat(100_000)].concat()).contains("more opcodes"));
        let memo = [b"N".as_slice(), &b"\x94".repeat(60_000), &vec![b'0'; 70_000]].concat();
        assert!(fault(&memo).contains("memo entries"));
        // One text, encoded again and again.
        let text = [b"X\x10\x27\0\0".as_slice(), &b"a".repeat(10_000), b"q\0"].concat();
        let encode = b"c_codecs\nencode\nh\0X\x06\0\0\0latin1\x86R0".repeat(1_000);
        assert!(fault(&[text, encode, b".".to_vec()].concat()).contains("over and over"));
    }

    #[test]
    fn integers_of_all_sizes() {
        assert_eq!(little_endian(b'i', &[0xfe]), Some(-2));
        assert_eq!(little_endian(b'u', &[0xfe]), Some(254));
        assert_eq!(little_endian(b'i', &[0, 1, 0, 0]), Some(256));
        assert_eq!(little_endian(b'u', &[0xff; 8]), None);
        assert_eq!(little_endian(b'i', &[0xff; 8]), Some(-1));
        assert_eq!(little_endian(b'i', &[0; 9]), None);
        assert_eq!(little_endian(b'f', &[0; 8]), None);
    }

    const PICKLES: [&[u8]; 5] = [
        include_bytes!("../tests/fixtures/pickles/array_0"),
        include_bytes!("../tests/fixtures/pickles/scalar_2"),
        include_bytes!("../tests/fixtures/pickles/list_4"),
        include_bytes!("../tests/fixtures/pickles/array_5"),
        include_bytes!("../tests/fixtures/pickles/python_2"),
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn any_bytes_give_a_value_or_a_fault(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(pickle) = Pickle::read(&bytes) {
                look(&pickle);
            }
        }

        /// Opcodes alone get further than random bytes.
        #[test]
        fn any_opcodes_give_a_value_or_a_fault(places in prop::collection::vec(0usize..40, 0..200)) {
            const OPCODES: &[u8] = b"]})(ltd2.0NaesuRb\x85\x86\x87\x94h\0q\0K\x01C\x01U\x01X\x01\0\0\0a\x88";
            let mut bytes: Vec<u8> = places.into_iter().map(|place| OPCODES[place % OPCODES.len()]).collect();
            bytes.push(b'.');
            if let Ok(pickle) = Pickle::read(&bytes) {
                look(&pickle);
            }
        }

        #[test]
        fn any_mutation_gives_a_value_or_a_fault(
            which in 0usize..PICKLES.len(),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            splice in (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<prop::sample::Index>()),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut bytes = PICKLES[which].to_vec();
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let (from, to, at) = (splice.0.index(bytes.len()), splice.1.index(bytes.len()), splice.2.index(bytes.len()));
            let part = bytes[from.min(to)..from.max(to)].to_vec();
            bytes.splice(at..at, part);
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok(pickle) = Pickle::read(&bytes) {
                look(&pickle);
            }
        }
    }
}
