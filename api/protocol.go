package api

import "strconv"

// The versions of api/v1 that this build speaks, the oldest and the newest. Peers that have none in common refuse each other
// with PROTOCOL_SKEW.
//
// Protocol is raised where a peer that does not know of a change would do harm, not where a field is added. OldestProtocol
// follows it one behind, so that of an agent and its CA either may be one version behind the other (docs/upgrades.md).
const (
	Protocol       = 1
	OldestProtocol = 1
)

// Protocols are the versions of api/v1 that one side speaks: all from Oldest to Newest.
type Protocols struct{ Oldest, Newest uint32 }

// SpokenProtocols are those of this build.
func SpokenProtocols() Protocols { return Protocols{OldestProtocol, Protocol} }

// ProtocolsOf are those that a peer says it speaks. A build that does not tell its oldest speaks one alone.
func ProtocolsOf(newest, oldest uint32) Protocols {
	if oldest == 0 {
		oldest = newest
	}
	return Protocols{oldest, newest}
}

// Common returns the newest version that both sides speak; 0 where there is none, which no build speaks.
func (p Protocols) Common(peer Protocols) uint32 {
	v := min(p.Newest, peer.Newest)
	if v < p.Oldest || v < peer.Oldest {
		return 0
	}
	return v
}

// Older reports whether all that p speaks is older than anything that peer does, so that p is the one to be upgraded.
func (p Protocols) Older(peer Protocols) bool { return p.Newest < peer.Oldest }

// String is for people: "2", or "1 to 2".
func (p Protocols) String() string {
	newest := strconv.FormatUint(uint64(p.Newest), 10)
	if p.Oldest == p.Newest {
		return newest
	}
	return strconv.FormatUint(uint64(p.Oldest), 10) + " to " + newest
}
