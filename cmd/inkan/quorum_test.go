package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"slices"
	"strings"
	"testing"
)

func TestQuorums(t *testing.T) {
	keys := make([]*ecdsa.PublicKey, 8)
	for i := range keys {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = &k.PublicKey
	}
	for _, c := range []struct{ m, n, groups int }{{0, 0, 1}, {0, 3, 1}, {3, 3, 1}, {1, 3, 3}, {2, 3, 3}, {2, 4, 6}, {3, 4, 4}, {3, 6, 20}} {
		names, groups, err := quorums("p", keys[:c.n], c.m)
		if err != nil || len(groups) != c.groups || len(names) != c.groups {
			t.Errorf("%d of %d: %d groups, %d are expected: %v", c.m, c.n, len(groups), c.groups, err)
			continue
		}
		seen := make(map[string]bool)
		for i, g := range groups {
			if c.m > 0 && len(g) != c.m {
				t.Errorf("%d of %d: a group of %d", c.m, c.n, len(g))
			}
			var id strings.Builder
			for _, k := range g {
				id.WriteByte(byte('a' + slices.Index(keys, k)))
			}
			if seen[id.String()] || seen[names[i]] {
				t.Errorf("%d of %d: %s twice", c.m, c.n, id.String())
			}
			seen[id.String()], seen[names[i]] = true, true
		}
	}
	for name, f := range map[string]func() error{
		"more than there are": func() error { _, _, err := quorums("p", keys[:2], 3); return err },
		"of none":             func() error { _, _, err := quorums("p", nil, 1); return err },
		"less than one":       func() error { _, _, err := quorums("p", keys[:2], -1); return err },
		"too many":            func() error { _, _, err := quorums("p", keys, 4); return err },
		"a key twice":         func() error { _, _, err := quorums("p", []*ecdsa.PublicKey{keys[0], keys[1], keys[0]}, 2); return err },
	} {
		if f() == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
