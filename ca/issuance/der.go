package issuance

import (
	"encoding/asn1"
	"errors"
	"iter"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// The walk over foreign DER. encoding/asn1 decodes into structs, where it ignores what follows the last field; here
// nothing is ignored. Only headers are decoded (definite, minimal lengths: DER), one level at a time, so that the depth
// and the number of elements of an input cost nothing that was not asked for.

var errDER = errors.New("malformed DER")

// isContext reports whether v is an implicitly tagged element, [tag].
func isContext(v asn1.RawValue, tag int, constructed bool) bool {
	return v.Class == asn1.ClassContextSpecific && v.Tag == tag && v.IsCompound == constructed
}

// isUniversal reports whether v is of that universal type, constructed where DER wants it so.
func isUniversal(v asn1.RawValue, tag int) bool {
	constructed := tag == asn1.TagSequence || tag == asn1.TagSet
	return v.Class == asn1.ClassUniversal && v.Tag == tag && v.IsCompound == constructed
}

// element returns the one element that der is made of.
func element(der []byte) (asn1.RawValue, error) {
	v, rest, err := next(der)
	if err != nil || len(rest) != 0 {
		return asn1.RawValue{}, errDER
	}
	return v, nil
}

// next returns the first of the elements that follow each other in der. None has a tag above 30: no form that is read here has
// such.
func next(der []byte) (v asn1.RawValue, rest []byte, err error) {
	s, whole, body := cryptobyte.String(der), cryptobyte.String(nil), cryptobyte.String(nil)
	var tag cbasn1.Tag
	if !s.ReadAnyASN1Element(&whole, &tag) {
		return v, nil, errDER
	}
	v.FullBytes = whole
	if !whole.ReadASN1(&body, tag) {
		return v, nil, errDER
	}
	v.Class, v.Tag, v.IsCompound, v.Bytes = int(tag>>6), int(tag&0x1f), tag&0x20 != 0, body
	return v, s, nil
}

// elements yields the elements that follow each other in der. An error is the last thing it yields.
func elements(der []byte) iter.Seq2[asn1.RawValue, error] {
	return func(yield func(asn1.RawValue, error) bool) {
		for len(der) > 0 {
			v, rest, err := next(der)
			if err != nil {
				yield(asn1.RawValue{}, err)
				return
			}
			if !yield(v, nil) {
				return
			}
			der = rest
		}
	}
}

// fields returns the elements of a SEQUENCE that has between least and most of them.
func fields(v asn1.RawValue, least, most int) ([]asn1.RawValue, error) {
	if !isUniversal(v, asn1.TagSequence) {
		return nil, errDER
	}
	out := make([]asn1.RawValue, 0, most)
	for f, err := range elements(v.Bytes) {
		if err != nil || len(out) == most {
			return nil, errDER
		}
		out = append(out, f)
	}
	if len(out) < least {
		return nil, errDER
	}
	return out, nil
}
