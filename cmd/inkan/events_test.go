package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"inkan/internal/problem"
	"inkan/issuer"
)

// TestAllEvents: the decision log has no end after the first page.
func TestAllEvents(t *testing.T) {
	const total = 2345
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var after int64
		if _, err := fmt.Sscan(r.URL.Query().Get("after"), &after); err != nil {
			t.Error(err)
		}
		page := []issuer.Event{}
		for n := after + 1; n <= total && len(page) < 1000; n++ {
			page = append(page, issuer.Event{ID: n})
		}
		problem.JSON(w, http.StatusOK, page)
	}))
	defer srv.Close()
	cl := issuer.NewClient(srv.URL, srv.Certificate(), tls.Certificate{})
	for after, want := range map[int64]int{0: total, 2000: total - 2000, total: 0} {
		list, err := allEvents(context.Background(), cl, after)
		if err != nil || len(list) != want || want > 0 && list[want-1].ID != total {
			t.Errorf("after %d: %d events, %v", after, len(list), err)
		}
	}
}

// TestOneLine: what a host said of itself makes no second line in a table, and
// tells a terminal nothing.
func TestOneLine(t *testing.T) {
	for in, want := range map[string]string{
		`agent "mm-07" is suspended`: `agent "mm-07" is suspended`,
		"naïve":                      "naïve",
		"a\nb\tc":                    `a\nb\tc`,
		"\x1b[2J\u202e":              `\x1b[2J\u202e`,
		"a\x00":                      `a\x00`,
	} {
		if got := oneLine(in); got != want || strings.ContainsAny(got, "\n\t\x1b") {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
