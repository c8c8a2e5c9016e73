package signer_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/audit"
	"inkan/internal/problem"
	"inkan/signer"
	"inkan/signer/client"
)

// TestCheckpoint: a head is signed when it is asked for, at the interval, and
// when the signer stops; each is one that the record verifies with.
func TestCheckpoint(t *testing.T) {
	self, _ := executables(t)
	d := start(t, agent("a", self)+"    checkpoint_interval: 1s\n")
	c := client.New(d.socket)
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Fatal(err)
	}
	var asked, latest signer.Checkpoint
	if err := c.Checkpoint(t.Context(), &asked); err != nil {
		t.Fatal(err)
	}
	if asked.Size != 1 || asked.Agent != d.agents["a"].ID || !strings.HasPrefix(asked.Note, "inkan-record/v1/example.org/agent/a\n1\n") {
		t.Errorf("checkpoint %+v", asked)
	}
	if opened, err := audit.OpenCheckpoint(asked.Note); err != nil || *opened != *asked.Checkpoint {
		t.Errorf("the note says %+v, the answer %+v, %v", opened, asked.Checkpoint, err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if err := c.Get(t.Context(), "/v1/checkpoint", &latest); err != nil {
			t.Fatal(err)
		}
		if latest.Time.After(asked.Time) {
			break
		}
		if time.Now().After(end) {
			t.Fatal("no checkpoint at the interval")
		}
	}
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Fatal(err)
	}
	d.end()
	r, err := audit.VerifyFile(t.Context(), filepath.Join(signer.AgentDir(filepath.Join(d.dir, "state"), "a"), signer.LogFile), audit.VerifyOptions{Roots: d.ca.Roots})
	if err != nil || r.Head == nil || r.Head.Size != 2 || r.After != 0 {
		t.Errorf("after the end: %+v, %v", r, err)
	}
}

func TestNoCheckpoint(t *testing.T) {
	self, _ := executables(t)
	d := start(t, agent("a", self))
	var got signer.Checkpoint
	if p, ok := client.New(d.socket).Get(t.Context(), "/v1/checkpoint", &got).(*problem.Problem); !ok || p.Status != http.StatusNotFound {
		t.Errorf("got %+v, want that there is none", got)
	}
	// Nothing of what is signed can be sent along.
	if err := client.New(d.socket).Checkpoint(t.Context(), &got); err != nil || got.Size != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	_, err := signer.ParseConfig([]byte("socket: s\nstate_dir: s\ntpm: none\nissuer: {url: 'https://localhost', ca: none}\nagents:\n"+agent("a", os.Args[0])+"    checkpoint_interval: 0s\n"), t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "checkpoint_interval") {
		t.Errorf("an interval of nothing: %v", err)
	}
}
