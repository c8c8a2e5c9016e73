package client_test

import (
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"inkan/signer/client"
)

// TestLongAnswer: the status of a signer with hundreds of agents is read.
func TestLongAnswer(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`["` + strings.Repeat("a", 8<<20) + `"]`)) // the client may be gone
	})}
	defer s.Close()
	go func() { _ = s.Serve(l) }() // it ends with the test
	var out []string
	if err := client.New(socket).Get(t.Context(), "/v1/status", &out); err != nil || len(out[0]) != 8<<20 {
		t.Error(err)
	}
}
