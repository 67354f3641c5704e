package controlplane

import "testing"

func TestQuick(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	c := startChild(t, cfg)
	t.Log(c.expect("ready"))
	c.stop()
	c = startChild(t, cfg)
	t.Log(c.expect("ready"))
	c.stop()
}
