package audit

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"strconv"
)

// A line is {"seq":N,"batch":M,<the entry's members>,"crc":"<8 hex digits>"} and a newline. M is the number of the first
// line that was written and synced together with it; it is left out where that is the line itself. The checksum covers
// what stands before its own member, so a line stays plain JSON and can still be checked without parsing it.
const (
	seqStart   = `{"seq":`
	batchStart = `,"batch":`
	crcStart   = `,"crc":"`
	crcEnd     = `"}`
	crcLen     = len(crcStart) + 8 + len(crcEnd)
	overhead   = len(seqStart) + 20 + len(batchStart) + 20 + crcLen + 1
)

// checksum is CRC-32C (RFC 3720 appendix B.4); the standard library makes its table once.
func checksum(line []byte) uint32 { return crc32.Checksum(line, crc32.MakeTable(crc32.Castagnoli)) }

// appendLine makes a line of the JSON object body, which has at least one member.
func appendLine(to []byte, seq, batch uint64, body []byte) []byte {
	start := len(to)
	to = append(to, seqStart...)
	to = strconv.AppendUint(to, seq, 10)
	if batch != seq {
		to = append(to, batchStart...)
		to = strconv.AppendUint(to, batch, 10)
	}
	to = append(to, ',')
	to = append(to, body[1:len(body)-1]...)
	sum := checksum(to[start:])
	to = append(to, crcStart...)
	to = hex.AppendEncode(to, binary.BigEndian.AppendUint32(nil, sum))
	return append(append(to, crcEnd...), '\n')
}

// What can be wrong with a line, or with a segment.
const (
	noChecksum    = "it has no checksum"
	wrongChecksum = "its checksum does not fit"
	noNumber      = "it has no number"
	wrongNumber   = "it has another number"
	tooLong       = "it is too long"
	noNewline     = "it is not complete"
	notParsed     = "its content does not parse"
	gap           = "there is nothing, and something behind it"
	missing       = "its segment is missing"
)

// parseLine returns the numbers of a line, which is without its newline, or why it is none.
func parseLine(line []byte) (seq, batch uint64, why string) {
	covered := line[:max(0, len(line)-crcLen)]
	sum, begins := bytes.CutPrefix(line[len(covered):], []byte(crcStart))
	sum, ends := bytes.CutSuffix(sum, []byte(crcEnd))
	if !begins || !ends {
		return 0, 0, noChecksum
	}
	if string(sum) != fmt.Sprintf("%08x", checksum(covered)) {
		return 0, 0, wrongChecksum
	}
	rest, ok := bytes.CutPrefix(covered, []byte(seqStart))
	if seq, rest = number(rest); !ok || seq == 0 {
		return 0, 0, noNumber
	}
	batch = seq
	if after, ok := bytes.CutPrefix(rest, []byte(batchStart)); ok {
		if batch, rest = number(after); batch == 0 || batch >= seq {
			return 0, 0, noNumber
		}
	}
	if len(rest) == 0 || rest[0] != ',' {
		return 0, 0, noNumber
	}
	return seq, batch, ""
}

// number cuts a number from the start of b; zero where there is none.
func number(b []byte) (n uint64, rest []byte) {
	end := 0
	for end < len(b) && '0' <= b[end] && b[end] <= '9' {
		end++
	}
	n, err := strconv.ParseUint(string(b[:end]), 10, 64)
	if err != nil || b[0] == '0' {
		return 0, b
	}
	return n, b[end:]
}
