//! Inodes with what hangs on them: content, attributes, marks of deletion.
//!
//! Owns the rules of one inode. Reads the tables inode, extent, xattr and orphan side by side, all in the order of inode numbers.

use super::blocks::{Blocks, Look, next_of};
use super::names::{Missing, Node, Nodes, UNREADABLE};
use super::types::{Findings, Fix, Kind, Totals};
use super::{Input, Rows, Stop};
use crate::format::tables::{
    BLOCKS_PER_CHUNK, Body, Extents, FileKind, INLINE_MAX, Inode, chunk_of_extent_key, table,
};
use crate::ids::{Ino, NUMBERS_END};
use crate::vfs::{NEXT_INO, SIZE_MAX, TARGET_MAX, USAGE, Usage, XATTR_NAME_MAX, XATTR_VALUE_MAX, units};

/// What the extents of one inode add up to.
#[derive(Default)]
struct Content {
    any: bool,
    units: u64,
    /// Where the last block ends, in bytes.
    end: u64,
    /// Some of it cannot be counted.
    unknown: bool,
}

/// Reads all inodes and checks each with what hangs on it; gives what the names are compared with.
pub(super) fn read(
    input: &Input<'_>,
    blocks: &mut Blocks,
    findings: &mut Findings,
    totals: &mut Totals,
) -> Result<Nodes, Stop> {
    let mut nodes = Nodes::default();
    let mut inodes = input.rows(table::INODE);
    let mut extents = input.rows(table::EXTENT);
    let mut xattrs = input.rows(table::XATTR);
    let mut orphans = input.rows(table::ORPHAN);
    let mut used = Usage::default();
    loop {
        let mut least: Option<u64> = None;
        for rows in [&mut inodes, &mut extents, &mut xattrs, &mut orphans] {
            let number = rows.peek_number()?;
            least = [least, number].into_iter().flatten().min();
        }
        let Some(number) = least else { break };
        let ino = Ino(number);
        let row = inodes.next_of(number)?;
        let content = read_content(input, &mut extents, ino, blocks, findings)?;
        let attributes = read_attributes(&mut xattrs, ino, findings)?;
        let orphan = orphans.next_of(number)?;
        let Some((_, value)) = row else {
            if let Some((key, _)) = orphan {
                findings.about(Kind::OrphanOfNothing, Some(Fix::DeleteRow { key }), || {
                    format!("inode {ino} is on the list of what is deleted, but is not there")
                });
            }
            if content.any || attributes {
                nodes.missing.insert(ino, Missing { directory: false, size: content.end });
            }
            continue;
        };
        totals.inodes += 1;
        used.inodes += 1;
        let mut node = Node::new(ino, orphan.is_some());
        match Inode::decode(&value) {
            Ok(inode) => {
                node.take(&inode);
                used.blocks = used.blocks.saturating_add(check_inode(ino, &inode, &content, findings));
            }
            Err(e) => {
                node.flags |= UNREADABLE;
                findings.at(Kind::Unreadable, ino, None, || {
                    format!("its inode cannot be read ({e}): bring the file back with mirrorfs restore")
                });
            }
        }
        nodes.list.push(node);
    }
    let least = nodes.list.last().map_or(0, |n| n.ino.saturating_add(1));
    let least = least.max(nodes.missing.last_key_value().map_or(0, |(i, _)| i.0.saturating_add(1)));
    check_next(input, NEXT_INO, "inode", least, 2, findings)?;
    check_usage(input, used, findings)?;
    Ok(nodes)
}

fn read_content(
    input: &Input<'_>,
    rows: &mut Rows<'_>,
    ino: Ino,
    blocks: &mut Blocks,
    findings: &mut Findings,
) -> Result<Content, Stop> {
    let mut content = Content::default();
    while let Some((key, value)) = rows.next_of(ino.0)? {
        let chunk = chunk_of_extent_key(&key).and_then(|c| c.checked_mul(BLOCKS_PER_CHUNK));
        let (extents, chunk) = match (Extents::decode(&value), chunk) {
            (Ok(extents), Some(chunk)) if !extents.is_empty() => (extents, chunk),
            (Ok(_), Some(_)) => {
                findings.at(Kind::EmptyExtent, ino, Some(Fix::DeleteRow { key }), || {
                    "a row of its content names no block".to_owned()
                });
                continue;
            }
            (extents, _) => {
                (content.any, content.unknown) = (true, true);
                let why = extents.map_or_else(|e| e.to_string(), |_| "a bad key".to_owned());
                findings.at(Kind::Unreadable, ino, None, || {
                    format!("a part of its content cannot be read ({why}): bring the file back with mirrorfs restore")
                });
                continue;
            }
        };
        content.any = true;
        for (i, id) in extents.0.iter().enumerate().filter(|(_, id)| id.0 != 0) {
            let index = chunk.saturating_add(i as u64);
            let from = index.saturating_mul(u64::from(input.block_size));
            let len = match blocks.used(*id) {
                Look::Known(len) => len,
                Look::Unreadable => {
                    content.unknown = true;
                    continue;
                }
                Look::Nowhere => {
                    content.unknown = true;
                    findings.at(Kind::BlockMissing, ino, None, || {
                        let to = from.saturating_add(u64::from(input.block_size));
                        format!(
                            "bytes {from} to {to} are lost here: block {id} is neither sealed nor waits to be; bring the file back \
                             with mirrorfs restore"
                        )
                    });
                    continue;
                }
                Look::Misplaced(len) => {
                    let why = blocks.why_misplaced(input, *id)?;
                    findings.at(Kind::BlockPlace, ino, None, || {
                        let to = from.saturating_add(u64::from(len));
                        format!(
                            "bytes {from} to {to} (block {id}) can be read only while they are cached: {why}"
                        )
                    });
                    len
                }
            };
            content.units += units(len);
            content.end = content.end.max(from.saturating_add(u64::from(len)));
        }
    }
    Ok(content)
}

/// Whether there are any.
fn read_attributes(rows: &mut Rows<'_>, ino: Ino, findings: &mut Findings) -> Result<bool, Stop> {
    let mut any = false;
    while let Some((key, value)) = rows.next_of(ino.0)? {
        any = true;
        let name = key.get(9..).unwrap_or_default();
        if name.is_empty()
            || name.len() > XATTR_NAME_MAX
            || value.len() > XATTR_VALUE_MAX
            || name.contains(&0)
        {
            findings.at(Kind::Attribute, ino, None, || {
                let name = name.escape_ascii();
                format!(
                    "it has the impossible attribute \"{name}\" of {} bytes: remove it, or copy the file",
                    value.len()
                )
            });
        }
    }
    Ok(any)
}

/// Checks one inode; gives the units that it is to have.
fn check_inode(ino: Ino, inode: &Inode, content: &Content, findings: &mut Findings) -> u64 {
    let regular = inode.kind == FileKind::Regular;
    let mut counted = Some(content.units).filter(|_| !content.unknown);
    match &inode.body {
        Body::Inline(bytes) => {
            if !regular {
                findings.at(Kind::Body, ino, None, || format!("a {:?} with content", inode.kind));
            } else if bytes.len() > INLINE_MAX || bytes.len() as u64 > inode.size {
                let size = bytes.len() as u64;
                let fix = (bytes.len() <= INLINE_MAX).then_some(Fix::SetSize { ino, size });
                findings.at(Kind::Body, ino, fix, || {
                    format!("{} bytes lie in the inode of a file of {} bytes", bytes.len(), inode.size)
                });
            }
            counted = Some(units(bytes.len() as u32));
        }
        Body::Target(target) => {
            let fits = !target.is_empty() && target.len() <= TARGET_MAX && !target.contains(&0);
            if inode.kind != FileKind::Symlink {
                findings.at(Kind::Body, ino, None, || format!("a {:?} with a link's target", inode.kind));
            } else if !fits {
                findings.at(Kind::Target, ino, None, || {
                    format!("its target of {} bytes leads nowhere: make the link anew", target.len())
                });
            } else if inode.size != target.len() as u64 {
                let fix = Fix::SetSize { ino, size: target.len() as u64 };
                findings.at(Kind::Size, ino, Some(fix), || {
                    format!("size {}, but its target has {} bytes", inode.size, target.len())
                });
            }
        }
        Body::Blocks if inode.kind == FileKind::Symlink => {
            findings.at(Kind::Target, ino, None, || "a link without a target: make it anew".to_owned());
        }
        Body::Blocks => {}
    }
    let hides = !regular || matches!(inode.body, Body::Inline(_));
    if hides && content.any {
        let fix = Fix::MoveBlocks { ino, size: content.end };
        findings.at(Kind::HiddenBlocks, ino, Some(fix), || {
            "it has blocks that nobody can read, as its content lies elsewhere".to_owned()
        });
    } else if regular && content.end > inode.size && inode.size <= SIZE_MAX {
        let fix = (content.end <= SIZE_MAX).then_some(Fix::SetSize { ino, size: content.end });
        findings.at(Kind::BlockBeyondEnd, ino, fix, || {
            format!("size {}, but there is content up to byte {}", inode.size, content.end)
        });
    }
    if inode.size > SIZE_MAX {
        findings.at(Kind::Size, ino, None, || format!("size {}, more than a file can have", inode.size));
    }
    if inode.kind == FileKind::Directory {
        if inode.size != 0 || inode.blocks != 0 {
            findings.at(Kind::DirectorySize, ino, Some(Fix::ClearDirectory { ino }), || {
                format!("a directory with size {} and {} units", inode.size, inode.blocks)
            });
        }
        return 0;
    }
    // One that is being deleted keeps its figure until the end.
    match counted {
        // Blocks that are hidden are moved first, then it is counted.
        Some(counted) if inode.nlink > 0 && !(hides && content.any) && counted != inode.blocks => {
            findings.at(Kind::Allocated, ino, Some(Fix::SetUnits { ino, units: counted }), || {
                format!("{} units of 512 bytes are counted, but it takes {counted}", inode.blocks)
            });
            counted
        }
        _ => inode.blocks,
    }
}

fn check_usage(input: &Input<'_>, used: Usage, findings: &mut Findings) -> Result<(), Stop> {
    let value = input.source.get(&crate::format::tables::volume_key(USAGE))?;
    let stored = Usage::decode(value);
    if stored != used {
        let fix = Fix::SetUsage { blocks: used.blocks, inodes: used.inodes };
        findings.about(Kind::Usage, Some(fix), || {
            format!(
                "the totals say {} units in {} inodes, but it is {} units in {}",
                stored.blocks, stored.inodes, used.blocks, used.inodes
            )
        });
    }
    Ok(())
}

/// Numbers that are in use must lie below the next one to be given, and that below the end of all
/// numbers.
pub(super) fn check_next(
    input: &Input<'_>,
    name: &'static str,
    what: &str,
    least: u64,
    without: u64,
    findings: &mut Findings,
) -> Result<(), Stop> {
    let stored = next_of(input, name, without)?;
    if least > NUMBERS_END {
        findings.about(Kind::NextNumber, None, || {
            format!(
                "{what} number {} is in use, and there are none from {NUMBERS_END} on: bring the volume back from a replica \
                 without it",
                least - 1
            )
        });
    } else if stored >= NUMBERS_END {
        findings.about(Kind::NextNumber, Some(Fix::SetNext { name, next: least.max(without) }), || {
            format!("the next {what} would get number {stored}, and there are none from {NUMBERS_END} on")
        });
    } else if stored < least {
        findings.about(Kind::NextNumber, Some(Fix::SetNext { name, next: least }), || {
            format!("the next {what} would get number {stored}, but numbers up to {} are in use", least - 1)
        });
    }
    Ok(())
}
