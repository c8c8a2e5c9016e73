package audit

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// proofHeader begins a proof (c2sp.org/tlog-proof).
const proofHeader = "c2sp.org/tlog-proof@v1\n"

// maxProof bounds a proof, in bytes: a path of at most 63 hashes, and the head.
const maxProof = 64*45 + MaxCheckpoint

// formatProof writes the proof that leaf index is in the tree of a signed checkpoint.
func formatProof(index uint64, p tlog.RecordProof, note string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%sindex %d\n", proofHeader, index)
	for _, h := range p {
		b.WriteString(base64.StdEncoding.EncodeToString(h[:]))
		b.WriteByte('\n')
	}
	b.WriteByte('\n')
	b.WriteString(note)
	return b.String()
}

var errProof = errors.New("it is not a proof of inclusion")

// parseProof reads a proof and refuses any spelling but the one of formatProof.
func parseProof(text string) (index uint64, p tlog.RecordProof, note string, err error) {
	rest, ok := strings.CutPrefix(text, proofHeader+"index ")
	number, rest, ok2 := strings.Cut(rest, "\n")
	n, err := strconv.ParseInt(number, 10, 64)
	if len(text) > maxProof || !ok || !ok2 || err != nil || n < 0 {
		return 0, nil, "", errProof
	}
	for {
		line, after, ok := strings.Cut(rest, "\n")
		if !ok {
			return 0, nil, "", errProof
		}
		rest = after
		if line == "" {
			break
		}
		h, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(h) != tlog.HashSize || len(p) == 64 {
			return 0, nil, "", errProof
		}
		p = append(p, tlog.Hash(h))
	}
	if formatProof(uint64(n), p, rest) != text {
		return 0, nil, "", errProof
	}
	return uint64(n), p, rest, nil
}

// hashBlock is how many stored hashes are read at a time, and maxHashes how
// many are remembered: neighbours in the record share most of their paths.
const (
	hashBlock = 256
	maxHashes = 1 << 16
)

// hashReader reads the stored hashes of a snapshot.
func (s *Snapshot) hashReader(ctx context.Context) tlog.HashReaderFunc {
	known := make(map[int64]tlog.Hash)
	load := func(from int64) error {
		if len(known) > maxHashes {
			clear(known)
		}
		rows, err := s.tx.QueryContext(ctx, "SELECT idx, hash FROM hash WHERE idx >= ? AND idx < ?", from, from+hashBlock)
		if err != nil {
			return err
		}
		defer rows.Close()
		count := s.counted()
		for rows.Next() {
			var x int64
			var b []byte
			if err := rows.Scan(&x, &b); err != nil {
				return err
			}
			if err := count(len(b)); err != nil {
				return err
			}
			if len(b) != tlog.HashSize {
				return fmt.Errorf("%w: hash %d does not have 32 bytes", ErrDamaged, x)
			}
			known[x] = tlog.Hash(b)
		}
		return rows.Err()
	}
	return func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			h, ok := known[x]
			if !ok {
				if err := load(x - x%hashBlock); err != nil {
					return nil, err
				}
				if h, ok = known[x]; !ok {
					return nil, fmt.Errorf("%w: hash %d is missing", ErrDamaged, x)
				}
			}
			out[i] = h
		}
		return out, nil
	}
}
